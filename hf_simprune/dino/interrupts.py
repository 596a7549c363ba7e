# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM end a run between two steps, never inside one."""

import signal
import time
from types import FrameType


# Launchers pass on the Ctrl-C that a terminal has already sent to all of their processes.
SAME_SIGNAL_SECONDS = 1.0


class Interrupts:
    """While active, the first SIGINT or SIGTERM only sets `requested`; one more than a second later acts at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._since = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interrupts":
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

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
