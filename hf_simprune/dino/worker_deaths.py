# SPDX-License-Identifier: Apache-2.0
"""A loader's worker that died is reported between two steps, never inside one."""

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from types import FrameType


_REPORT = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)")
_UNTIL_A_DEATH_IS_KNOWN = 2.0  # seconds


class WorkerDied(RuntimeError):
    """A worker of the loader ended; the message says which and how."""


class WorkerDeaths:
    """While active, torch's loader tells of a dead worker inside `waiting` only.

    By itself it raises from a signal handler, in the middle of whatever the process does at that moment, such as an
    optimiser's step or the writing of a file. What happened outside of `waiting` is raised when it is entered next.
    """

    def __init__(self) -> None:
        self._report: Callable[[int, FrameType | None], object] | None = None
        self._died = False

    def __enter__(self) -> "WorkerDeaths":
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for data. Raises WorkerDied."""
        report = self._give_back()
        try:
            if self._died and report is not None:
                self._died = False
                report(signal.SIGCHLD, None)
            yield
        except Exception as error:
            raise_if_died(error)
            if isinstance(error, (OSError, EOFError, UnpicklingError)):
                self._ask()  # a batch cannot be fetched from a process that is gone, and its death is heard of later
            raise
        finally:
            self._take_over()

    @staticmethod
    def _ask() -> None:
        report = signal.getsignal(signal.SIGCHLD)
        if not callable(report):
            return
        deadline = time.monotonic() + _UNTIL_A_DEATH_IS_KNOWN
        try:
            while time.monotonic() < deadline:
                report(signal.SIGCHLD, None)
                time.sleep(0.05)
        except RuntimeError as error:
            raise_if_died(error)
            raise

    def _take_over(self) -> None:
        # the loader puts its handler there when it starts its first worker
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler):
            self._report = handler
            signal.signal(signal.SIGCHLD, self._note)

    def _give_back(self) -> Callable[[int, FrameType | None], object] | None:
        report, self._report = self._report, None
        if report is not None:
            signal.signal(signal.SIGCHLD, report)
        return report

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._died = True


def raise_if_died(error: Exception) -> None:
    """Raise WorkerDied if that is what the loader's `error` tells."""
    found = _REPORT.match(str(error))
    if found is not None:
        which, fate = found.groups()
        raise WorkerDied(
            f"a data loader's worker (process {which}) {fate.strip().rstrip('.')}, as happens where memory runs out"
        ) from error
