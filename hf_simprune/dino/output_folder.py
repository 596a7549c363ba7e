# SPDX-License-Identifier: Apache-2.0
"""Keeping a run from writing over something it should not."""

import re
from pathlib import Path

from ..atomic import clear_leftovers, remove_folder
from ..errors import InputError
from .arguments import DinoArguments
from .folder_lock import LOCK_FILE, check_unlocked


RUN_FILE = "training/run.json"
# What a run writes into its folder, and nothing else; `clear_previous_run` removes no other name.
_RUN_NAMES = re.compile(
    r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|preprocessor_config\.json|"
    r"README\.md|\.eval_results|metrics\.jsonl|loss_curve\.png|pruned_tokens\.png|tokens_by_depth\.png|training|logs|(abandoned-)?checkpoint-\d+"
)


def check_output_dir(args: DinoArguments) -> None:
    """Refuse a folder that holds files, unless the run resumes there or overwrites an earlier run.

    Call it on the main process, before anything is written. Nothing is changed.

    Raises:
        InputError: the path is a file or holds files; `--resume_from_checkpoint` finds no checkpoint;
            `--overwrite_output_dir` would write over files that no run has written.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file: name a folder")
    check_unlocked(folder)
    if args.resume_from_checkpoint is not None:
        from .checkpoint import find_checkpoint

        checkpoint = find_checkpoint(folder, args.resume_from_checkpoint)
        if checkpoint.resolve().parent == folder.resolve():
            return
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    names = [name for name in names if name != LOCK_FILE]
    if args.overwrite_output_dir:
        taken = [name for name in names if _RUN_NAMES.fullmatch(name)]
        if taken and not _is_run(folder):
            raise InputError(
                f"--overwrite_output_dir: {folder} holds {taken[0]} but no {RUN_FILE}, so another program wrote it: "
                "choose another --output_dir"
            )
        return
    if names:
        content = "a run" if _is_run(folder) else f"files ({names[0]} …)" if len(names) > 1 else f"a file ({names[0]})"
        raise InputError(
            f"--output_dir {folder} already holds {content}: use --overwrite_output_dir to replace a run, "
            "--resume_from_checkpoint latest to go on with it, or another folder"
        )


def clear_previous_run(output_dir: Path) -> list[str]:
    """Remove what an earlier run wrote and return the names; files of any other name stay."""
    if not _is_run(output_dir):
        return []
    names = sorted(path.name for path in output_dir.iterdir() if _RUN_NAMES.fullmatch(path.name))
    # what marks the folder as a run's goes last: killed before that, the same command clears it again
    for name in sorted(names, key=lambda name: name == Path(RUN_FILE).parts[0]):
        path = output_dir / name
        if path.is_dir() and not path.is_symlink():
            remove_folder(path)
        else:
            path.unlink()
    return names


def tidy_up(output_dir: Path) -> list[str]:
    """Remove what a killed run left unfinished, and give a checkpoint that it was replacing its name back.

    Returns the names of what was found; files of any other name stay. No run may be writing there.
    """
    from .export import RESULT

    found = clear_leftovers(output_dir, lambda name: name == RESULT or _RUN_NAMES.fullmatch(name) is not None)
    return found + clear_leftovers(output_dir / Path(RUN_FILE).parent)


def _is_run(folder: Path) -> bool:
    """Also of a folder whose run was killed before it had written anything else."""
    return (folder / RUN_FILE).is_file() or (folder / LOCK_FILE).is_file()
