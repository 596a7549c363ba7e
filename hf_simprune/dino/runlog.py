# SPDX-License-Identifier: Apache-2.0
"""What a run tells while it runs: `metrics.jsonl`, trackers and a progress bar. None of them can end a run."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from ..atomic import flush, new_file, reason
from ..errors import InputError
from .main_process import on_main


class RunLog:
    """Writes on the main process only. Build it in all of them.

    Args:
        path: `metrics.jsonl`, one JSON object a line.
        accelerator: its trackers receive the same numbers.
        start_step: lines of later steps, left by a run that went on after its last checkpoint, are removed.
        total_steps: length of the progress bar.
        unwritten: `unwritten` of the log of the run that goes on, as its checkpoint has it.

    Attributes:
        unwritten: lines that could not be written yet. They are written before the next ones, as soon as it is
            possible.
        evaluated: whether the file holds an evaluation of the step it starts at.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        accelerator: Accelerator,
        start_step: int,
        total_steps: int,
        disable_tqdm: bool = False,
        unwritten: Sequence[str] = (),
    ) -> None:
        self.path = path
        self.accelerator = accelerator
        self.unwritten: list[str] = []
        self._troubled: set[str] = set()
        self.evaluated = on_main(
            accelerator, lambda: _holds_evaluation(cut_back(path, start_step, unwritten), start_step)
        )
        self._length = path.stat().st_size if accelerator.is_main_process else 0
        self.bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            disable=disable_tqdm or not accelerator.is_main_process,
            dynamic_ncols=True,
        )

    def write(self, record: dict[str, Any]) -> None:
        """Append one object, which has a `step`, and pass its numbers to the trackers."""
        if not self.accelerator.is_main_process:
            return
        self.unwritten.append(json.dumps(record) + "\n")
        self.flush()
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        for tracker in self.accelerator.trackers:
            try:
                tracker.log(numbers, step=record["step"])
            except Exception as error:  # each tracker has errors of its own, and none is worth the run
                self._complain(tracker.name, f"{tracker.name} does not take numbers ({reason(error)})")

    def flush(self, to_disk: bool = False) -> None:
        """Write the lines that wait; `to_disk` also sees to it that a power cut does not take them."""
        if not self.accelerator.is_main_process or not (self.unwritten or to_disk):
            return
        try:
            length = append("".join(self.unwritten), self.path, self._length)
            if to_disk:
                flush(self.path)
        except OSError as error:
            message = f"{self.path} cannot be written ({reason(error)}); its lines wait in memory"
            self._complain(self.path.name, message)
            return
        self._length = length
        if self.path.name in self._troubled:
            self._troubled.remove(self.path.name)
            self.say(f"{self.path} is written again, the {len(self.unwritten)} lines that waited too")
        self.unwritten = []

    def say(self, message: str) -> None:
        """A line above the progress bar."""
        if self.accelerator.is_main_process:
            with suppress(OSError):  # the output may go into a file on a full disk
                tqdm.write(message)

    def advance(self, **shown: Any) -> None:
        """Move the bar by one step."""
        with suppress(OSError):
            if shown:
                self.bar.set_postfix(shown, refresh=False)
            self.bar.update()

    def close(self) -> None:
        self.flush()
        if self.unwritten:
            self.say(f"warning: {len(self.unwritten)} lines of {self.path} are lost: they could never be written")
        with suppress(OSError):
            self.bar.close()

    def _complain(self, about: str, message: str) -> None:
        """Once for each stretch of trouble: a full disk would fill the screen too."""
        if about not in self._troubled:
            self._troubled.add(about)
            self.say(f"warning: {message}; the run goes on")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All objects of a `metrics.jsonl`; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def cut_back(path: Path, step: int, unwritten: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Leave of a `metrics.jsonl` the lines up to `step`, unchanged and in one stroke; returns their objects.

    Lines that cannot be read go too, such as a last one cut short by a crash. `unwritten` are lines up to `step` that
    are added unless they are there. At step 0 the file is empty afterwards.

    Raises:
        InputError: the file cannot be read or written.
    """
    try:
        found = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        lines = [line for line in found if 0 < step >= _step(line)]
        lines += [line for line in map(str.encode, unwritten) if line not in lines]
        if not path.exists() or lines != found:
            with new_file(path) as partial:
                partial.write_bytes(b"".join(lines))
    except OSError as error:
        raise InputError(f"--output_dir {path.parent}: {path.name} cannot be written: {reason(error)}") from None
    return [json.loads(line) for line in lines]


def append(text: str, path: Path, length: int) -> int:
    """Append to a file of `length` bytes, whole or not at all; returns its new length.

    Bytes beyond `length`, which an earlier failure has left, are overwritten.
    """
    data = text.encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        length = min(length, os.fstat(descriptor).st_size)
        try:
            os.lseek(descriptor, length, os.SEEK_SET)
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.ftruncate(descriptor, length + len(data))
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, length)
            raise
    finally:
        os.close(descriptor)
    return length + len(data)


def _step(line: bytes) -> float:
    """The step of a line; infinite where the line cannot be read or is not whole."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        step = None
    return step if isinstance(step, int) else float("inf")


def _holds_evaluation(records: Sequence[dict[str, Any]], step: int) -> bool:
    return any(r["step"] == step and "loss" not in r and "collapse" not in r for r in records)
