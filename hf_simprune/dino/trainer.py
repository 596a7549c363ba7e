# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, logging, k-NN, checkpoints, interruption and resumption."""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..errors import EvaluationError, InputError, TrainingError, TrainingInterrupted
from .checkpoint import (
    Contents,
    NotSavedError,
    check_files,
    checkpoint_tensors,
    find_checkpoint,
    last_checkpoint,
    load_checkpoint,
    read_state,
    rotate_checkpoints,
    write_checkpoint,
)
from .engine import DinoEngine, NonFiniteLossError, StepResult, Views
from .feed import NOTHING, Feed, Fetched
from .interrupts import Interrupts
from .main_process import on_main
from .monitor import CollapseMonitor
from .runlog import RunLog
from .schedules import DinoSchedules, StepValues
from .step_record import shown, step_record
from .view_source import OtherReadersError, ViewSource
from .window import Window
from .worker_deaths import WorkerDeaths


Evaluation = Callable[[int, Callable[[], bool]], dict[str, float] | None]

MAX_SKIPPED_IN_A_ROW = 50
LEARN_GENTLER = "try a lower learning rate, a longer warm-up, or fp32"
RESUME = "run the same command with --resume_from_checkpoint latest"


@dataclass(frozen=True)
class LoopSettings:
    """How the loop logs and saves; names as in `DinoArguments`. `identity` holds what must not change on resume."""

    output_dir: Path
    images_per_step: int
    steps_per_epoch: int | None = None
    seed: int = 42
    logging_steps: int = 10
    save_steps: int = 500
    save_total_limit: int | None = 2
    knn_every: int = 0
    disable_tqdm: bool = False
    allow_schedule_change: bool = False
    identity: dict[str, Any] = field(default_factory=dict)


def step_seed(seed: int, batch: int, rank: int) -> int:
    """Seed of torch's generators in one step (drop path): resuming needs no stored state."""
    digest = hashlib.blake2b(f"{seed}:{batch}:{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class DinoTrainer:
    """Runs `engine` over `source` until `schedules.total_steps` optimiser steps are done.

    Args:
        engine: model, optimiser and objective.
        schedules: values of every step.
        source: crops.
        settings: logging, saving, seed.
        evaluate: called before the first step, after every `knn_every` steps and after the last, with the step and a
            function that says whether to give up, which all processes must ask equally often; returns numbers to log
            as an object of their own, or None where it gave up; raises EvaluationError where there are none to be had.
        snapshot: called with (step, views, values) before the steps listed in `snapshot_steps`.
        describe_window: numbers to log about the curriculum's window.
        after_save: called on the main process with the step of each new checkpoint.
    """

    def __init__(
        self,
        engine: DinoEngine,
        schedules: DinoSchedules,
        source: ViewSource,
        settings: LoopSettings,
        evaluate: Evaluation | None = None,
        snapshot: Callable[[int, Views, StepValues], None] | None = None,
        snapshot_steps: frozenset[int] = frozenset(),
        describe_window: Callable[[StepValues], dict[str, float]] | None = None,
        after_save: Callable[[int], None] | None = None,
    ) -> None:
        self.engine = engine
        self.schedules = schedules
        self.source = source
        self.settings = settings
        self.evaluate = evaluate
        self.snapshot = snapshot
        self.snapshot_steps = snapshot_steps
        self.describe_window = describe_window or (lambda values: {})
        self.after_save = after_save
        self.monitor = CollapseMonitor(out_dim=engine.out_dim, start_step=schedules.warmup_end)
        self.step = 0
        self.batches_seen = 0
        self.skipped_in_a_row = 0
        self.bad_indices: set[int | str] = set()
        self.window = Window()
        self.source_state = source.state_dict()
        self.log: RunLog | None = None
        self.unwritten_metrics: list[str] = []

    @property
    def accelerator(self) -> Accelerator:
        """The engine's."""
        return self.engine.accelerator

    def resume(self, resume_from: str) -> Path:
        """Continue from `latest` or from a checkpoint folder.

        Raises:
            InputError: no such checkpoint, damaged files, another architecture, or another schedule without
                `allow_schedule_change`.
        """
        checkpoint = find_checkpoint(self.settings.output_dir, resume_from)
        on_main(self.accelerator, lambda: check_files(checkpoint))
        found = read_state(checkpoint)["identity"]
        for option, value in self._identity().items():
            before = found.get(option, value)
            if before != value and not self.settings.allow_schedule_change:
                raise InputError(
                    f"--resume_from_checkpoint {checkpoint}: {option} was {before} and is now {value}; use the "
                    "original value, or --allow_schedule_change to go on as another run from here"
                )
        state = load_checkpoint(checkpoint, self.engine)
        self._load_source(state["source"])
        self.step = state["step"]
        self.batches_seen = state["batches_seen"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.bad_indices = set(state["bad_indices"])
        self.window = Window(**state["window"])
        self.monitor.load_state_dict(state["monitor"])
        self.unwritten_metrics = state["unwritten_metrics"]
        return checkpoint

    def _load_source(self, states: list[dict[str, Any]]) -> None:
        """Each process takes its own of the states that as many had."""
        processes = self.accelerator.num_processes
        try:
            # where the order is a function of the step, any number of processes can go on
            if not any(states) or not self.source.state_dict():
                self.source.load_state_dict(states[0])
            elif len(states) == processes:
                self.source.load_state_dict(states[self.accelerator.process_index])
            else:
                raise OtherReadersError(
                    f"--resume_from_checkpoint: {processes} process(es) were launched, but the checkpoint was written "
                    f"by {len(states)}, which each read a share of the stream; launch {len(states)}"
                )
        except OtherReadersError as error:
            if not self.settings.allow_schedule_change:
                raise OtherReadersError(
                    f"{error}, or use --allow_schedule_change to go on at the stream's next epoch"
                ) from None
            epoch = self.source.begin_next_epoch(states)
            self.accelerator.print(f"{error}: --allow_schedule_change, so it goes on at the start of epoch {epoch}")
        self.source_state = self.source.state_dict()

    def train(self) -> None:
        """Train to the end.

        Raises:
            TrainingError: data that cannot be read, a non-finite loss, too many steps in a row with non-finite
                gradients, or a last checkpoint that cannot be written.
            TrainingInterrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        """
        total = self.schedules.total_steps
        settings = self.settings
        log = self.log = RunLog(
            settings.output_dir / "metrics.jsonl",
            self.accelerator,
            self.step,
            total,
            settings.disable_tqdm,
            self.unwritten_metrics,
        )
        try:
            with Interrupts() as interrupts, WorkerDeaths() as deaths:
                self._loop(log, interrupts, Feed(self.source, self.batches_seen, deaths))
        finally:
            log.close()

    def _loop(self, log: RunLog, interrupts: Interrupts, feed: Feed) -> None:
        if not log.evaluated:
            self._evaluate_if_due(log, interrupts)
        fetched, stop = self._fetch(feed, interrupts)
        if stop:
            self._interrupted()
        while self.step < self.schedules.total_steps:
            started = time.perf_counter()
            values = self.schedules.at(self.step)
            result, views = self._step(fetched.micro_batches, values)
            self.batches_seen += 1
            self.source_state = self.source.state_dict()
            self._note_bad_images((index for each in views for index in each.bad_indices), log)
            saved = False
            if result.skipped:
                self._count_skipped(log)
            else:
                self._count_step(log, result, values, time.perf_counter() - started, fetched.seconds)
                # before the evaluation, which may take longer than a machine gives that is about to go
                saved = self._save_if_due(log)
                self._evaluate_if_due(log, interrupts)
            fetched, stop = self._fetch(feed, interrupts)
            if stop:
                self._interrupted(saved)

    def _step(self, micro_batches: Sequence[Any], values: StepValues) -> tuple[StepResult, list[Views]]:
        settings = self.settings
        torch.manual_seed(step_seed(settings.seed, self.batches_seen, self.accelerator.process_index))
        views = [self.source.views(batch) for batch in micro_batches]
        self.engine.before_step(self.step, settings.steps_per_epoch, views)
        if self.snapshot is not None and self.step in self.snapshot_steps:
            self.snapshot(self.step, views[0], values)
        try:
            result = self.engine.step(views, values, diagnostics=self._log_due(self.step + 1))
        except NonFiniteLossError as error:
            raise TrainingError(self._stopped(str(error))) from error
        if result.skipped and self.accelerator.scaler is None:
            # a loss scale would be lowered and the next step be finite again; here something is broken
            raise TrainingError(self._stopped("gradients are not finite, and no step was taken"))
        return result, views

    def _fetch(self, feed: Feed, interrupts: Interrupts) -> tuple[Fetched, bool]:
        """What the next step needs, and whether to stop before it; all processes agree, as none can go on alone.

        Raises:
            TrainingError: in every process, where one cannot read its data.
        """
        requested = interrupts.requested is not None
        fetched = NOTHING if requested or self.step >= self.schedules.total_steps else feed.fetch()
        stop, failed = self._any_process(requested, fetched.error is not None)
        if failed:
            reasons = [reason for reason in gather_object([fetched.failure]) if reason is not None]
            raise TrainingError(self._stopped(reasons[0], RESUME)) from fetched.error
        return fetched, stop

    def _interrupted(self, saved: bool = False) -> NoReturn:
        if not saved:
            self._save_for_good()
        raise TrainingInterrupted(
            f"interrupted after step {self.step}; everything is saved. To resume, run the same command with "
            "--resume_from_checkpoint latest"
        )

    def _count_step(
        self, log: RunLog, result: StepResult, values: StepValues, seconds: float, data_wait: float
    ) -> None:
        self.skipped_in_a_row = 0
        self.step += 1
        self.window.add(result, data_wait + seconds, data_wait)
        message = self.monitor.update(self.step, result.cls_loss, result.teacher_entropy)
        if message:
            log.say(f"warning: {message}")
            log.write({"step": self.step, "collapse": message})
        offset = self.describe_window(values).get("window_offset")
        bar = shown(self.window, result, self.settings.images_per_step)
        log.advance(**bar, **({} if offset is None else {"window": f"{offset:g}"}))
        if self._log_due(self.step):
            self._log(log, result, values)

    def save(self, rotate: bool = True) -> Path:
        """Write a checkpoint of the current step; the main process does, and the others wait for it.

        Raises:
            NotSavedError: in every process: it could not be written, and earlier ones are as they were.
        """
        if self.log is not None:
            self.log.flush(to_disk=True)  # the lines of a step must not be lost where its checkpoint is not
        state, tensors = self._state(), checkpoint_tensors(self.engine)
        keep = self.settings.save_total_limit if rotate else None
        return on_main(self.accelerator, lambda: self._write_checkpoint(state, tensors, keep))

    def _save_if_due(self, log: RunLog) -> bool:
        """Whether it was due and done."""
        if self.step == self.schedules.total_steps:
            self._save_for_good()
            return True
        if self.step % self.settings.save_steps != 0:
            return False
        try:
            self.save()
        except NotSavedError as error:
            log.say(f"warning: {error}; the run goes on and tries again in {self.settings.save_steps} steps")
            return False
        return True

    def _save_for_good(self) -> None:
        try:
            self.save()
        except NotSavedError as error:
            raise TrainingError(f"stopped after step {self.step}: {error}; mend that first") from error

    def _state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "batches_seen": self.batches_seen,
            "source": gather_object([self.source_state]),
            "skipped_in_a_row": self.skipped_in_a_row,
            "bad_indices": sorted(set(gather_object(sorted(self.bad_indices)))),
            "window": vars(self.window),
            "monitor": self.monitor.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "identity": self._identity(),
            "unwritten_metrics": list(self.log.unwritten) if self.log is not None else [],
        }

    def _write_checkpoint(self, state: dict[str, Any], tensors: Contents, keep: int | None) -> Path:
        path = write_checkpoint(self.settings.output_dir, tensors, state)
        warning = rotate_checkpoints(self.settings.output_dir, path, keep)
        if warning:
            self.accelerator.print(warning)
        if self.after_save is not None:
            self.after_save(self.step)
        return path

    def _any_process(self, *here: bool) -> list[bool]:
        """Of each, whether it is so in any process."""
        if self.accelerator.num_processes == 1:
            return list(here)
        flags = torch.tensor(here, dtype=torch.float32, device=self.accelerator.device)
        return (self.accelerator.reduce(flags) > 0).tolist()

    def _finite(self) -> bool:
        """Whether the student's parameters are, in every process."""
        finite = all(bool(p.isfinite().all()) for p in self.engine.dual.student.parameters())
        return not self._any_process(not finite)[0]

    def _identity(self) -> dict[str, Any]:
        return {"total steps": self.schedules.total_steps, "--seed": self.settings.seed, **self.settings.identity}

    def _log_due(self, step: int) -> bool:
        return step % self.settings.logging_steps == 0 or step == self.schedules.total_steps

    def _evaluation_due(self) -> bool:
        every = self.settings.knn_every
        ends = self.step == 0 or self.step >= self.schedules.total_steps
        return ends or (every > 0 and self.step % every == 0)

    def _evaluate_if_due(self, log: RunLog, interrupts: Interrupts) -> None:
        """Given up where the run is to stop; the run that goes on from this step makes up for it."""

        def stopped() -> bool:
            return self._any_process(interrupts.requested is not None)[0]

        if self.evaluate is None or not self._evaluation_due() or stopped():
            return
        started = time.perf_counter()
        try:
            numbers = self.evaluate(self.step, stopped)
        except EvaluationError as error:
            log.say(f"warning: step {self.step} was not evaluated: {error}")
            return
        if numbers is None:
            return
        log.write({"step": self.step, **self._epoch(), **numbers})
        cost = f" ({time.perf_counter() - started:.1f} s)"
        log.say(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items()) + cost)

    def _epoch(self) -> dict[str, float]:
        per_epoch = self.settings.steps_per_epoch
        return {"epoch": round(self.step / per_epoch, 4)} if per_epoch else {}

    def _log(self, log: RunLog, result: StepResult, values: StepValues) -> None:
        self._share_bad_images(log)
        measured = step_record(self.window, result, values, self.settings.images_per_step)
        window = self.describe_window(values)
        log.write({"step": self.step, **self._epoch(), **measured, **window, "bad_images": len(self.bad_indices)})
        self.window = Window()

    def _note_bad_images(self, indices: Iterable[int | str], log: RunLog) -> None:
        for index in indices:
            if index not in self.bad_indices:
                self.bad_indices.add(index)
                log.say(f"warning: image {index} cannot be read; the next readable one takes its place")

    def _share_bad_images(self, log: RunLog) -> None:
        """Learn of the unreadable images that other processes met; every process logs at the same steps."""
        if self.accelerator.num_processes > 1:
            everywhere = gather_object(sorted(self.bad_indices))
            self._note_bad_images(everywhere, log)

    def _count_skipped(self, log: RunLog) -> None:
        self.skipped_in_a_row += 1
        log.say(f"step {self.step}: gradients are not finite; skipped, nothing was updated")
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(self._stopped(f"gradients were not finite {self.skipped_in_a_row} times in a row"))

    def _stopped(self, reason: str, advice: str = LEARN_GENTLER) -> str:
        """Save what there is, unless it is spoiled; call it in all processes."""
        saved = last_checkpoint(self.settings.output_dir)
        kept = f"The last good checkpoint is {saved.name}" if saved is not None else "There is no checkpoint yet"
        try:
            if self._finite():
                self.save(rotate=False)  # what was saved before may be the better place to go on from
                kept = f"The network of the last good step is in checkpoint-{self.step}"
        except NotSavedError as error:
            kept = f"The network of the last good step is lost: {error}"
        return f"stopped at step {self.step}: {reason}. {kept}; {advice}"
