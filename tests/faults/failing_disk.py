"""A disk that fails: at the layer of Python's file calls, or a real one that is full."""

import builtins
import errno
import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
from safetensors import SafetensorError

from hf_simprune.dino.folder_lock import LOCK_FILE


MIB = 2**20


class FailingDisk:
    """Raises from the `first`-th call that changes the disk on, for `count` of them.

    On a full disk (ENOSPC) these are the calls that create, write, extend, flush or rename; a read-only one (EROFS)
    also refuses to remove. Reading works all the time.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int = errno.ENOSPC) -> None:
        self.code = code
        self.first: int | None = None
        self.count = self.calls = 0
        room = {os: ("write", "mkdir", "fsync", "ftruncate")}
        names = {os: ("rename", "replace", "unlink", "rmdir")} if code == errno.EROFS else {os: ("rename", "replace")}
        for module, calls in [*room.items(), *names.items()]:
            for name in calls:
                monkeypatch.setattr(module, name, self._watched(getattr(module, name)))
        monkeypatch.setattr(os, "open", self._watched(os.open, lambda path, flags, *_, **__: flags & os.O_CREAT))
        for module in (io, builtins):
            monkeypatch.setattr(module, "open", self._watched(open, lambda file, mode="r", *_, **__: "r" not in mode))
        written = safetensors.torch.serialize_file
        monkeypatch.setattr(safetensors.torch, "serialize_file", self._watched(written, kind=SafetensorError))

    def fail(self, first: int = 1, count: int | None = None) -> None:
        """From the `first`-th call on; `count` calls, or all."""
        self.first, self.count, self.calls = first, 10**9 if count is None else count, 0

    def mend(self) -> bool:
        """Works again; returns whether it had failed."""
        failed = self.first is not None and self.calls >= self.first
        self.first = None
        return failed

    def _watched(self, call, needed=lambda *_, **__: True, kind=OSError):
        def checked(*args, **kwargs):
            if self.first is not None and needed(*args, **kwargs):
                self.calls += 1
                if self.first <= self.calls < self.first + self.count:
                    text = os.strerror(self.code)
                    raise OSError(self.code, text) if kind is OSError else kind(f"I/O error: {text}")
            return call(*args, **kwargs)

        return checked


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of that size; the test is skipped where it may not be mounted."""
    folder.mkdir()
    size = f"size={mebibytes}m"
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        if subprocess.run(["umount", folder], capture_output=True).returncode:
            subprocess.run(["umount", "--lazy", folder], check=True)
            pytest.fail("a file on the disk is still in use")


def fill(disk: Path, spare: int = 0) -> None:
    """Leave at most `spare` bytes."""
    with (disk / "ballast").open("ab", buffering=0) as file:
        free = shutil.disk_usage(disk).free
        file.write(bytes(max(free - spare, 0)))


def empty(disk: Path) -> None:
    (disk / "ballast").unlink()


def set_writable(disk: Path, writable: bool) -> None:
    subprocess.run(["mount", "-o", f"remount,{'rw' if writable else 'ro'}", disk], check=True)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def hidden(folder: Path) -> list[str]:
    """What is left of unfinished files and folders."""
    return sorted(path.name for path in folder.rglob(".*") if path != folder / LOCK_FILE)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
