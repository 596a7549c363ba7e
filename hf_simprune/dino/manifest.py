# SPDX-License-Identifier: Apache-2.0
"""Checksums of a folder's files, written beside them and compared before they are read again."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


MANIFEST = "manifest.json"
_CHUNK = 1 << 20


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`: `{"files": {name: {"bytes": …, "sha256": …}}}` for every file in `folder`."""
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    with ThreadPoolExecutor() as threads:  # hashing does not hold Python's lock
        sums = threads.map(sha256, files)
        entries = {
            path.name: {"bytes": path.stat().st_size, "sha256": total} for path, total in zip(files, sums, strict=True)
        }
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=2))


def find_damage(folder: Path, wanted: tuple[str, ...]) -> str | None:
    """What is wrong with the files of a folder that has a manifest, in words that begin with a file's name.

    wanted: names that must be in it.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_bytes())["files"]
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return f"{MANIFEST} cannot be read"
    for name in wanted:
        if name not in expected:
            return f"{MANIFEST} does not list {name}"
    # lengths first: they cost nothing
    wrong = (_wrong_length(folder, name, size) for name, (size, _) in expected.items())
    wrong_content = (_wrong_content(folder / name, total) for name, (_, total) in expected.items())
    return next(filter(None, wrong), None) or next(filter(None, wrong_content), None)


def _wrong_length(folder: Path, name: str, size: int) -> str | None:
    path = folder / name
    try:
        if Path(name).name != name or not path.is_file():
            return f"{name} is missing"
        found = path.stat().st_size
    except (OSError, ValueError) as error:
        return f"{name} cannot be read ({error})"
    return None if found == size else f"{name} has {found:,} bytes instead of {size:,}"


def _wrong_content(path: Path, total: str) -> str | None:
    try:
        same = sha256(path) == total
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None if same else f"{path.name} is not what was written (its checksum differs)"


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal; reads 1 MiB at a time."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
