# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, logging, k-NN, checkpoints, interruption and resumption."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..errors import InputError, TrainingError, TrainingInterrupted
from .checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from .engine import DinoEngine, NonFiniteLossError, StepResult, Views
from .interrupts import Interrupts
from .monitor import CollapseMonitor
from .runlog import RunLog
from .schedules import DinoSchedules, StepValues


MAX_SKIPPED_IN_A_ROW = 50


class ViewSource(Protocol):
    """Where crops come from. `batches(start)` yields the micro-batches of one optimiser step after another, beginning
    with the `start`-th; `views` turns one of them into normalised crops on the device."""

    def batches(self, start: int) -> Iterator[Sequence[Any]]: ...

    def views(self, batch: Any) -> Views: ...


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


@dataclass
class Window:
    """Sums since the last logged step."""

    steps: int = 0
    loss: float = 0.0
    entropy: float = 0.0
    seconds: float = 0.0
    data_wait: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    def add(self, result: StepResult, seconds: float, data_wait: float) -> None:
        self.steps += 1
        self.loss += result.loss
        self.entropy += result.teacher_entropy
        self.seconds += seconds
        self.data_wait += data_wait
        for name, value in result.parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + value

    @property
    def cls_loss(self) -> float:
        """As `StepResult.cls_loss`, summed."""
        return self.parts.get("dino_loss", self.loss)


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
        self.bad_indices: set[int] = set()
        self.window = Window()

    @property
    def accelerator(self) -> Accelerator:
        return self.engine.accelerator

    def resume(self, resume_from: str) -> Path:
        """Continue from `latest` or from a checkpoint folder.

        Raises:
            InputError: no such checkpoint, another architecture, or another schedule without
                `allow_schedule_change`.
        """
        checkpoint = find_checkpoint(self.settings.output_dir, resume_from)
        state = load_checkpoint(checkpoint, self.engine)
        for option, value in self._identity().items():
            before = state["identity"].get(option, value)
            if before != value and not self.settings.allow_schedule_change:
                raise InputError(
                    f"--resume_from_checkpoint {checkpoint}: {option} was {before} and is now {value}; use the "
                    "original value, or --allow_schedule_change to go on as another run from here"
                )
        self.step = state["step"]
        self.batches_seen = state["batches_seen"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.bad_indices = set(state["bad_indices"])
        self.window = Window(**state["window"])
        self.monitor.load_state_dict(state["monitor"])
        return checkpoint

    def train(self) -> None:
        """Train to the end.

        Raises:
            TrainingError: non-finite loss, or too many steps in a row with non-finite gradients.
            TrainingInterrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        """
        total = self.schedules.total_steps
        settings = self.settings
        log = RunLog(settings.output_dir / "metrics.jsonl", self.accelerator, self.step, total, settings.disable_tqdm)
        try:
            with Interrupts() as interrupts:
                if self.step == 0:
                    self._evaluate(log)
                self._loop(log, interrupts)
            if total not in self._evaluation_steps():
                self._evaluate(log)
        finally:
            log.close()

    def _loop(self, log: RunLog, interrupts: Interrupts) -> None:
        settings = self.settings
        batches = self.source.batches(self.batches_seen)
        while self.step < self.schedules.total_steps:
            started = time.perf_counter()
            micro_batches = next(batches)
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
            self.batches_seen += 1
            self._note_bad_images(views, log)
            if result.skipped:
                self._count_skipped(log)
            else:
                self._count_step(log, result, values, time.perf_counter() - started, data_wait)
            finished = self.step == self.schedules.total_steps
            save_due = not result.skipped and self.step % settings.save_steps == 0
            interrupted = self._any_process(interrupts.requested is not None)
            if finished or save_due or interrupted:
                self.save()
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

    def save(self, rotate: bool = True) -> Path | None:
        """Write a checkpoint of the current step; the main process does, and the others wait for it."""
        self.accelerator.wait_for_everyone()
        keep = self.settings.save_total_limit if rotate else None
        path = self._write_checkpoint(keep) if self.accelerator.is_main_process else None
        # a process that ended now would make the launcher end the one that writes
        self.accelerator.wait_for_everyone()
        return path

    def _write_checkpoint(self, keep: int | None) -> Path:
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "batches_seen": self.batches_seen,
            "skipped_in_a_row": self.skipped_in_a_row,
            "bad_indices": sorted(self.bad_indices),
            "window": vars(self.window),
            "monitor": self.monitor.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "identity": self._identity(),
        }
        path = save_checkpoint(self.settings.output_dir, self.engine, state, keep)
        if self.after_save is not None:
            self.after_save(self.step)
        return path

    def _any_process(self, here: bool) -> bool:
        """Whether it is so in any process: they must all stop after the same step, whenever a signal reached each."""
        if self.accelerator.num_processes == 1:
            return here
        return self.accelerator.reduce(torch.tensor(float(here), device=self.accelerator.device)).item() > 0

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

    def _stopped(self, reason: str) -> str:
        self.save(rotate=False)  # what was saved before may be the better place to go on from
        return (
            f"stopped at step {self.step}: {reason}. The network of the last good step is in "
            f"checkpoint-{self.step}; try a lower learning rate, a longer warm-up, or fp32"
        )
