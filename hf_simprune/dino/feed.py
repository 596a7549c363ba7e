# SPDX-License-Identifier: Apache-2.0
"""The batches of a run. A failure to read one is an answer, as the processes must agree before they stop."""

import time
from collections.abc import Sequence
from pickle import UnpicklingError
from typing import Any, NamedTuple

import pyarrow

from ..errors import TrainingError
from .view_source import ViewSource
from .worker_deaths import WorkerDeaths, WorkerDied


# Of files, of formats, of a loader whose worker died or which ran out of memory, shared memory or descriptors.
DATA_ERRORS = (
    WorkerDied, TrainingError, OSError, EOFError, UnpicklingError, MemoryError, RuntimeError, pyarrow.ArrowException,
)  # fmt: skip


class Fetched(NamedTuple):
    """The micro-batches of one optimiser step, or what kept them from being read; and the seconds it took."""

    micro_batches: Sequence[Any]
    seconds: float
    error: Exception | None = None

    @property
    def failure(self) -> str | None:
        """What went wrong, on one line."""
        if self.error is None:
            return None
        text = str(self.error).strip() or repr(self.error)
        if "Traceback" in text:  # torch puts a worker's whole traceback before the message
            text = text.splitlines()[-1]
        return " ".join(text.split())


NOTHING = Fetched((), 0.0)


class Feed:
    """Batches of `source` from the `start`-th on."""

    def __init__(self, source: ViewSource, start: int, deaths: WorkerDeaths) -> None:
        self.batches = source.batches(start)
        self.deaths = deaths

    def fetch(self) -> Fetched:
        """Wait for the next one."""
        started = time.perf_counter()
        try:
            with self.deaths.waiting():
                batches, error = next(self.batches), None
        except DATA_ERRORS as caught:
            batches, error = (), caught
        return Fetched(batches, time.perf_counter() - started, error)
