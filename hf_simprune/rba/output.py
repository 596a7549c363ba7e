# SPDX-License-Identifier: Apache-2.0
"""The output folder of `analyze` and `compress`: whole or not there at all."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..atomic import STORAGE_ERRORS, flush, flush_tree, reason
from ..errors import InputError, TrainingError


REPORT = "redundancy.json"
PICTURE = "redundancy.png"
RECORD = "compression.json"
CARD = "README.md"
# What a result consists of, and nothing else; replacing one removes no other name.
_RESULT_NAMES = re.compile(
    r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(pre)?processor_config\.json|"
    r"README\.md|\.eval_results|compression\.json|redundancy\.(json|png)|\w+_simprune_\w+\.py|"
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|spiece\.model"
)


def check_output_dir(output_dir: str, overwrite: bool) -> None:
    """Refuse a folder that holds files, unless an earlier result of this package is to be replaced.

    Raises:
        InputError: the path is a file or holds files; `--overwrite_output_dir` where no earlier result lies; a folder
            that cannot be written.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file: name a folder")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if names and not overwrite:
        if REPORT in names:
            raise InputError(
                f"--output_dir {folder} already holds an earlier result: name another folder, or use "
                "--overwrite_output_dir to replace it"
            )
        raise InputError(f"--output_dir {folder} already holds files ({names[0]} …): name another folder")
    taken = [name for name in names if _RESULT_NAMES.fullmatch(name)]
    if taken and REPORT not in names:
        raise InputError(
            f"--overwrite_output_dir: {folder} holds {taken[0]} but no {REPORT}, so it is no earlier result: choose "
            "another --output_dir"
        )
    ancestor = folder.absolute()
    while not ancestor.exists():
        ancestor = ancestor.parent
    try:
        tempfile.TemporaryDirectory(prefix=".", dir=ancestor).cleanup()
    except OSError as error:
        raise InputError(
            f"--output_dir {folder}: {ancestor} cannot be written to ({error.strerror}): name another folder"
        ) from None


@contextmanager
def building(output_dir: str, option: str = "--output_dir") -> Iterator[Path]:
    """A hidden folder beside `output_dir` to write into; it takes its place when the block ends without an error.

    What an earlier result wrote there is replaced, other files stay. After an error, or Ctrl-C, nothing is left.
    `option` names the folder in messages.

    Raises:
        TrainingError: a file could not be written.
    """
    final = Path(output_dir).absolute()
    folder = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
        folder.chmod(0o777 & ~_umask())
        yield folder
        flush_tree(folder)
        _put_in_place(folder, final)
    except STORAGE_ERRORS as error:
        raise TrainingError(f"{option} {output_dir} could not be written: {reason(error)}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _put_in_place(folder: Path, final: Path) -> None:
    if not final.exists() or not any(final.iterdir()):
        if final.exists():
            final.rmdir()
        folder.replace(final)
        return
    names = [path.name for path in folder.iterdir()]
    # REPORT marks the folder as a result, so it stays until the new one takes its place
    for name in sorted(names):
        if (final / name).is_dir():
            shutil.rmtree(final / name)
        (folder / name).replace(final / name)
    for path in list(final.iterdir()):
        if path.name not in names and _RESULT_NAMES.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    flush(final)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
