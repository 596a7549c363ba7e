# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM end a run between two steps, never inside one."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any


# Launchers pass on the Ctrl-C that a terminal has already sent to all of their processes.
SAME_SIGNAL_SECONDS = 1.0


class Interrupts:
    """While active, the first SIGINT or SIGTERM only sets `requested`; one more than a second later acts at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.requested is None:
            self._restore()
        # otherwise a copy of the signal may still be under way; the first one that is none restores

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since > SAME_SIGNAL_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def outlive_interrupts(worker: int) -> None:
    """For a loader's worker. Ctrl-C, and a scheduler's SIGTERM, reach the whole process group; the training process
    decides, and its workers go on until it stops them. A second SIGTERM that is no copy of the first acts at once.

    Handlers cannot tell who sent a signal, and two of the same kind may arrive as one, so a thread waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_on_demand, args=(os.getppid(),), daemon=True).start()


def _end_on_demand(parent: int) -> None:
    first = None
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        first = first if first is not None else time.monotonic()
        if sender == parent or time.monotonic() - first > SAME_SIGNAL_SECONDS:
            os._exit(128 + signal.SIGTERM)
