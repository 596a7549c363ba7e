# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder: two would tear each other's log and checkpoints."""

import errno
import os
from pathlib import Path
from typing import IO

from ..errors import InputError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = "training/.lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FolderLock:
    """Held by a run's main process until it ends, in whatever way; also seen by other machines on a shared disk.

    A forked process has no part in it, so that loader workers which outlive their run keep nobody out.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def take(self, output_dir: Path) -> str | None:
        """Returns a note to print where the file system knows no locks.

        Raises:
            InputError: another run has it.
            OSError: the file cannot be written.
        """
        if fcntl is None:
            return "warning: this system has no file locks: see to it that no other run writes into this folder"
        path = output_dir / LOCK_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                raise _taken(output_dir, file) from None
            file.close()
            if error.errno in _NOT_SUPPORTED:
                return f"warning: {output_dir} cannot be locked: see to it that no other run writes there"
            raise
        self.release()
        self._file = file
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        return None

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def check_unlocked(output_dir: Path) -> None:
    """Raises InputError where a run is at work in the folder. Nothing is changed; any number may ask at once."""
    path = output_dir / LOCK_FILE
    if fcntl is None or not path.is_file():
        return
    with open(path) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                raise _taken(output_dir, file) from None


def _taken(output_dir: Path, file: IO[str]) -> InputError:
    with file:
        file.seek(0)
        pid = file.read(20).strip()
    which = f"process {pid}" if pid.isdigit() else "another process"
    return InputError(
        f"--output_dir {output_dir}: a run is at work there ({which}, here or on another machine); wait for it, end "
        "it, or choose another folder"
    )
