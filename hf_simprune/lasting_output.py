# SPDX-License-Identifier: Apache-2.0
"""Messages and progress bars that cannot end a long run: the file they go to may lie on the disk that is full."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class LastingStream:
    """`stream`, whose failures to write are no failures here."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within it, `sys.stdout` and `sys.stderr` drop what cannot be written."""
    before = sys.stdout, sys.stderr
    # a program without a console has none
    sys.stdout, sys.stderr = (stream and LastingStream(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def forget_unwritten() -> None:
    """Before a program ends: what its output still holds and cannot write would become its exit status, 120."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
