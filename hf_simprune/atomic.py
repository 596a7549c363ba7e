# SPDX-License-Identifier: Apache-2.0
"""Files and folders that stand under their name whole or not at all, whatever ends the program that writes them.

Everything is written beside its place under a hidden name, brought to the disk, and renamed. What a killed program
leaves behind begins with `.partial-`, `.removed-` or `.replaced-`; `clear_leftovers` tidies it up.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


PARTIAL = ".partial-"
REMOVED = ".removed-"
REPLACED = ".replaced-"
# What a full, broken or read-only disk raises: safetensors reports it by an exception of its own.
STORAGE_ERRORS = (OSError, SafetensorError)
_NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def reason(error: Exception) -> str:
    """Why something could not be written, in a few words on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path beside `path`, with the same ending, to write to; it takes the place of `path` when the block ends.

    After an error `path` is as it was and nothing else is left.
    """
    partial = path.with_name(PARTIAL + path.name)
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """UTF-8; the folder must exist."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` to fill; it takes the place of `path` when the block ends.

    A folder that was at `path` is there until then. Two folders cannot change places in one step, so that for a moment
    the old one stands under `REPLACED`, where `standing` finds it. After an error everything is as it was.
    """
    partial = path.with_name(PARTIAL + path.name)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        flush_tree(partial)
        _put_in_place(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def standing(path: Path) -> Path:
    """Where the folder `path` is: there, or where a program killed while it replaced it has left it."""
    replaced = path.with_name(REPLACED + path.name)
    return replaced if not path.exists() and replaced.is_dir() else path


def remove_folder(path: Path) -> None:
    """Delete a folder; it loses its name first, so that a half-deleted one is never taken for a whole one."""
    removed = path.with_name(REMOVED + path.name)
    shutil.rmtree(removed, ignore_errors=True)
    os.rename(path, removed)
    shutil.rmtree(removed)


def original_name(name: str) -> str | None:
    """The name that a leftover was to have or had, or None for any other name."""
    for prefix in (PARTIAL, REMOVED, REPLACED):
        if name.startswith(prefix):
            return name[len(prefix) :]
    return None


def clear_leftovers(folder: Path, ours: Callable[[str], bool] = bool) -> list[str]:
    """Tidy up what a killed program left in `folder`, not in folders below; returns the leftovers' names.

    A folder that was about to be replaced gets its name back, everything else that was unfinished goes. No program may
    be writing there. `ours` says of the original name whether the leftover may be touched.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = [folder / name for name in sorted(names) if ours(original_name(name) or "")]
    for path in found:
        name = original_name(path.name)
        assert name is not None
        final = path.with_name(name)
        if standing(final) == path:
            os.rename(path, final)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in found]


def flush(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk; not all file systems can do the latter."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """`flush` for a folder and all that is in it."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def _put_in_place(partial: Path, path: Path) -> None:
    replaced = path.with_name(REPLACED + path.name)
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(path, replaced)
    moved = False
    try:
        os.rename(partial, path)
        moved = True
        flush(path.parent)
    except OSError:
        with suppress(OSError):
            if moved:
                os.rename(path, partial)
            if replaced.exists():
                os.rename(replaced, path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
