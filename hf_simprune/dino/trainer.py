# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, logging, k-NN, checkpoints, interruption and resumption."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..errors import InputError, TrainingError, TrainingInterrupted
from .checkpoint import (
    Contents,
    NotSavedError,
    check_files,
    checkpoint_tensors,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_state,
    rotate_checkpoints,
    write_checkpoint,
)
from .engine import DinoEngine, NonFiniteLossError, StepResult, Views
from .interrupts import Interrupts
from .main_process import on_main
from .monitor import CollapseMonitor
from .runlog import RunLog
from .schedules import DinoSchedules, StepValues
from .view_source import ViewSource
from .window import Window
from .worker_deaths import WorkerDeaths, WorkerDied


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
    """Seed of torch's generators in one step (drop path, random reduction): resuming needs no stored state."""
    digest = hashlib.blake2b(f"{seed}:{batch}:{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class DinoTrainer:
    """Runs `engine` over `source` until `schedules.total_steps` optimiser steps are done.

    Args:
        engine: model, optimiser and objective.
        schedules: values of every step.
        source: crops.
        settings: logging, saving, seed.
        evaluate: called with the step after every `knn_every` steps; returns numbers to log as an object of their own.
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
        evaluate: Callable[[int], dict[str, float]] | None = None,
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
        warning = on_main(self.accelerator, lambda: check_files(checkpoint))
        if warning:
            self.accelerator.print(warning)
        found = read_state(checkpoint).get("identity", {})
        for option, value in self._identity().items():
            before = found.get(option, value)
            if before != value and not self.settings.allow_schedule_change:
                raise InputError(
                    f"--resume_from_checkpoint {checkpoint}: {option} was {before} and is now {value}; use the "
                    "original value, or --allow_schedule_change to go on as another run from here"
                )
        state = load_checkpoint(checkpoint, self.engine)
        self._load_source(state.get("source", [{}]))
        self.step = state["step"]
        self.batches_seen = state["batches_seen"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.bad_indices = set(state["bad_indices"])
        self.window = Window(**state["window"])
        self.monitor.load_state_dict(state["monitor"])
        self.unwritten_metrics = state.get("unwritten_metrics", [])
        return checkpoint

    def _load_source(self, states: list[dict[str, Any]]) -> None:
        """Each process takes its own of the states that as many had."""
        processes = self.accelerator.num_processes
        if not any(states):  # the order is a function of the step, for any number of processes
            self.source.load_state_dict({})
        elif len(states) == processes:
            self.source.load_state_dict(states[self.accelerator.process_index])
        else:
            raise InputError(
                f"--resume_from_checkpoint: {processes} process(es) were launched, but the checkpoint was written by "
                f"{len(states)}, which each read a share of the stream; launch {len(states)}"
            )
        self.source_state = self.source.state_dict()

    def train(self) -> None:
        """Train to the end.

        Raises:
            TrainingError: non-finite loss, too many steps in a row with non-finite gradients, or a last checkpoint
                that cannot be written.
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
                if self.step == 0:
                    self._evaluate(log)
                self._loop(log, interrupts, deaths)
            if total not in self._evaluation_steps() and not log.evaluated:
                self._evaluate(log)
        finally:
            log.close()

    def _loop(self, log: RunLog, interrupts: Interrupts, deaths: WorkerDeaths) -> None:
        settings = self.settings
        batches = self.source.batches(self.batches_seen)
        while self.step < self.schedules.total_steps:
            started = time.perf_counter()
            try:
                with deaths.waiting():
                    micro_batches = next(batches)
            except WorkerDied as death:
                raise TrainingError(self._stopped(str(death), RESUME, alone=True)) from death
            data_wait = time.perf_counter() - started
            values = self.schedules.at(self.step)
            due = self._log_due(self.step + 1)
            torch.manual_seed(step_seed(settings.seed, self.batches_seen, self.accelerator.process_index))
            views = [self.source.views(batch) for batch in micro_batches]
            self.engine.before_step(self.step, settings.steps_per_epoch, views)
            if self.snapshot is not None and self.step in self.snapshot_steps:
                self.snapshot(self.step, views[0], values)
            try:
                result = self.engine.step(views, values, diagnostics=due)
            except NonFiniteLossError as error:
                raise TrainingError(self._stopped(str(error))) from error
            if result.skipped and self.accelerator.scaler is None:
                # a loss scale would be lowered and the next step be finite again; here something is broken
                raise TrainingError(self._stopped("gradients are not finite, and no step was taken"))
            self.batches_seen += 1
            self.source_state = self.source.state_dict()
            self._note_bad_images(views, log)
            if result.skipped:
                self._count_skipped(log)
            else:
                self._count_step(log, result, values, time.perf_counter() - started, data_wait)
            finished = self.step == self.schedules.total_steps
            save_due = not result.skipped and self.step % settings.save_steps == 0
            interrupted = self._any_process(interrupts.requested is not None)
            if finished or interrupted:
                self._save_for_good()
            elif save_due:
                self._save_if_possible(log)
            if interrupted and not finished:
                raise TrainingInterrupted(
                    f"interrupted after step {self.step}; everything is saved. To resume, run the same command with "
                    "--resume_from_checkpoint latest"
                )

    def _count_step(
        self, log: RunLog, result: StepResult, values: StepValues, seconds: float, data_wait: float
    ) -> None:
        self.skipped_in_a_row = 0
        self.step += 1
        self.window.add(result, seconds, data_wait)
        message = self.monitor.update(self.step, result.cls_loss, result.teacher_entropy)
        if message:
            log.say(f"warning: {message}")
            log.write({"step": self.step, "collapse": message})
        log.advance(**self._shown(result, values))
        if self._log_due(self.step):
            self._log(log, result, values)
        if self.step in self._evaluation_steps():
            self._evaluate(log)

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

    def _save_if_possible(self, log: RunLog) -> None:
        try:
            self.save()
        except NotSavedError as error:
            log.say(f"warning: {error}; the run goes on and tries again in {self.settings.save_steps} steps")

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

    def _any_process(self, here: bool) -> bool:
        """Whether it is so in any process: they must all stop after the same step, whenever a signal reached each."""
        if self.accelerator.num_processes == 1:
            return here
        return self.accelerator.reduce(torch.tensor(float(here), device=self.accelerator.device)).item() > 0

    def _finite(self) -> bool:
        """Whether the student's parameters are, in every process."""
        return not self._any_process(not all(bool(p.isfinite().all()) for p in self.engine.dual.student.parameters()))

    def _identity(self) -> dict[str, Any]:
        return {"total steps": self.schedules.total_steps, "--seed": self.settings.seed, **self.settings.identity}

    def _log_due(self, step: int) -> bool:
        return step % self.settings.logging_steps == 0 or step == self.schedules.total_steps

    def _evaluation_steps(self) -> range:
        every = self.settings.knn_every
        return range(every, self.schedules.total_steps + 1, every) if every else range(0)

    def _evaluate(self, log: RunLog) -> None:
        if self.evaluate is None:
            return
        self.accelerator.wait_for_everyone()
        started = time.perf_counter()
        numbers = self.evaluate(self.step)
        log.write({"step": self.step, **self._epoch(), **numbers})
        cost = f" ({time.perf_counter() - started:.1f} s)"
        log.say(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items()) + cost)

    def _epoch(self) -> dict[str, float]:
        per_epoch = self.settings.steps_per_epoch
        return {"epoch": round(self.step / per_epoch, 4)} if per_epoch else {}

    def _log(self, log: RunLog, result: StepResult, values: StepValues) -> None:
        self._share_bad_images(log)
        window, n = self.window, self.window.steps
        record = {
            "step": self.step,
            **self._epoch(),
            "loss": window.loss / n,
            "teacher_entropy": window.entropy / n,
            "kl": (window.cls_loss - window.entropy) / n,
            **{name: value / n for name, value in window.parts.items()},
            "gradient_norm": result.gradient_norm,
            "learning_rate": values.learning_rate,
            "weight_decay": values.weight_decay,
            "momentum_teacher": values.momentum_teacher,
            "teacher_temp": values.teacher_temp,
            **self.describe_window(values),
            "cls_std": result.cls_std,
            "cls_rank": result.cls_rank,
            "images_per_second": self.settings.images_per_step * n / window.seconds,
            "data_wait": window.data_wait / n,
            "compute": (window.seconds - window.data_wait) / n,
            "bad_images": len(self.bad_indices),
        }
        log.write(record)
        self.window = Window()

    def _shown(self, result: StepResult, values: StepValues) -> dict[str, str]:
        window = self.window
        shown = {"loss": f"{result.loss:.3f}"}
        if window.steps:
            shown["img/s"] = f"{self.settings.images_per_step * window.steps / window.seconds:.0f}"
        offset = self.describe_window(values).get("window_offset")
        return shown if offset is None else {**shown, "window": f"{offset:g}"}

    def _note_bad_images(self, micro_batches: Sequence[Views], log: RunLog) -> None:
        for views in micro_batches:
            for index in views.bad_indices:
                if index not in self.bad_indices:
                    self.bad_indices.add(index)
                    log.say(f"warning: image {index} cannot be read; the next readable one takes its place")

    def _share_bad_images(self, log: RunLog) -> None:
        """Learn of the unreadable images that other processes met; every process logs at the same steps."""
        if self.accelerator.num_processes > 1:
            everywhere = gather_object(sorted(self.bad_indices))
            self._note_bad_images([Views(None, None, tuple(everywhere))], log)

    def _count_skipped(self, log: RunLog) -> None:
        self.skipped_in_a_row += 1
        log.say(f"step {self.step}: gradients are not finite; skipped, nothing was updated")
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(self._stopped(f"gradients were not finite {self.skipped_in_a_row} times in a row"))

    def _stopped(self, reason: str, advice: str = LEARN_GENTLER, alone: bool = False) -> str:
        """Save what there is, unless it is spoiled; and not `alone` while other processes know of nothing."""
        saved = [path.name for path in list_checkpoints(self.settings.output_dir)]
        kept = f"The last good checkpoint is {saved[-1]}" if saved else "There is no checkpoint yet"
        try:
            if not (alone and self.accelerator.num_processes > 1) and self._finite():
                self.save(rotate=False)  # what was saved before may be the better place to go on from
                kept = f"The network of the last good step is in checkpoint-{self.step}"
        except NotSavedError as error:
            kept = f"The network of the last good step is lost: {error}"
        return f"stopped at step {self.step}: {reason}. {kept}; {advice}"
