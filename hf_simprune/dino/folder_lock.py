# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder: two would tear each other's log and checkpoints."""

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

from ..atomic import reason
from ..errors import InputError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"  # stays where it is: who removes a lock file lets a second run in
_PATIENCE = 0.5  # seconds
_TAKEN = (errno.EACCES, errno.EAGAIN)
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FolderLock:
    """Held by a run's main process until it ends, in whatever way; also seen by other machines on a shared disk.

    A forked process has no part in it, so that loader workers which outlive their run keep nobody out.
    """

    def __init__(self) -> None:
        self._file: int | None = None

    def take(self, output_dir: Path) -> str | None:
        """Returns a note to print where the file system knows no locks.

        Raises:
            InputError: another run has it.
            OSError: the file cannot be written.
        """
        if fcntl is None:
            return "warning: this system has no file locks: see to it that no other run writes into this folder"
        output_dir.mkdir(parents=True, exist_ok=True)
        file = os.open(output_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(file)
        except OSError as error:
            if error.errno in _TAKEN:
                raise _taken(output_dir, file) from None
            os.close(file)
            if error.errno in _NOT_SUPPORTED:
                return f"warning: {output_dir} cannot be locked: see to it that no other run writes there"
            raise
        self._file = file
        with suppress(OSError):  # it locks without telling whose it is
            os.ftruncate(file, 0)
            os.write(file, f"{os.getpid()}\n".encode())
        return None

    def release(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None


def _lock(file: int) -> None:
    """Tries for a moment, as `check_unlocked` of others may have it for one."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _TAKEN or time.monotonic() > deadline:
                raise
            time.sleep(_PATIENCE / 10)


def check_unlocked(output_dir: Path) -> None:
    """Raises InputError where a run is at work in the folder. Nothing is changed; any number may ask at once."""
    path = output_dir / LOCK_FILE
    if fcntl is None or not path.is_file():
        return
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"--output_dir {output_dir}: {LOCK_FILE} in it cannot be read: {reason(error)}") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise _taken(output_dir, file) from None
    os.close(file)


def _taken(output_dir: Path, file: int) -> InputError:
    """Closes the file."""
    try:
        pid = os.read(file, 20).decode(errors="replace").strip()
    finally:
        os.close(file)
    which = f"process {pid}" if pid.isdigit() else "another process"
    return InputError(
        f"--output_dir {output_dir}: a run is at work there ({which}, here or on another machine); wait for it, end "
        "it, or choose another folder"
    )
