# SPDX-License-Identifier: Apache-2.0
"""Options that go into a card, checked before any work. Imports no torch."""

import difflib
from typing import Any

from ..errors import InputError
from .hub_names import hub_names, is_hub_id, is_repo_id


_IDS = ("base_model_id", "dataset_id", "eval_dataset_id")


def check_card_options(args: Any) -> None:
    """Check `--license`, `--base_model_id`, `--dataset_id`, `--eval_dataset_id` and `--eval_task_id`.

    Args:
        args: options with those fields and those of the data set and the checkpoint.

    Raises:
        InputError: names the option, its value and what would be accepted.
    """
    check_license(args.license)
    for name in _IDS:
        _check_id(name, vars(args)[name])
    _check_copy("base_model_id", args.base_model_id, "model_name_or_path", args.model_name_or_path)
    _check_copy("dataset_id", args.dataset_id, "dataset_name_or_path", args.dataset_name_or_path)
    evaluated = args.eval_dataset_name_or_path or args.dataset_name_or_path
    check_benchmark(args.eval_dataset_id, args.eval_task_id, evaluated, args.eval_split)


def check_license(license: str | None) -> None:
    """Refuse a licence that the Hub does not know.

    Raises:
        InputError: it is unknown there, or is `other`, which needs a name and a link beside it.
    """
    if license == "other":
        raise InputError(
            "--license other: it needs a name and a link, so leave the option out and write license, license_name and "
            "license_link into the card yourself"
        )
    known = hub_names("licenses")
    if license is not None and license not in known:
        close = difflib.get_close_matches(license.lower().replace(" ", "-"), known, n=1)
        hint = f"did you mean {close[0]}?" if close else "give one such as apache-2.0, mit, cc-by-nc-4.0 or unknown"
        raise InputError(f"--license {license} is no licence identifier of the Hub: {hint}")


def check_benchmark(eval_dataset_id: str | None, eval_task_id: str, evaluated: str, split: str | None) -> None:
    """Refuse a benchmark that the images cannot be of.

    Args:
        eval_dataset_id: Hub id of the benchmark, None for none.
        eval_task_id: its task.
        evaluated: name or path of the data set that is evaluated on.
        split: that is evaluated on; None where images are held out of others.

    Raises:
        InputError: a malformed id, images of another data set of the Hub, or no split named.
    """
    if eval_dataset_id is None:
        if eval_task_id != "default":
            raise InputError(f"--eval_task_id {eval_task_id} is a task of a benchmark: name that by --eval_dataset_id")
        return
    _check_id("eval_dataset_id", eval_dataset_id)
    if not eval_task_id.strip():
        raise InputError("--eval_task_id is empty: give the task's id in the benchmark's eval.yaml, or leave it out")
    if is_hub_id(evaluated) and evaluated != eval_dataset_id:
        raise InputError(
            f"--eval_dataset_id {eval_dataset_id}: the images that are evaluated on are those of {evaluated}"
        )
    if split is None:
        raise InputError(
            f"--eval_dataset_id {eval_dataset_id}: a benchmark's score is that of one of its splits: name it by "
            "--eval_split"
        )


def _check_id(name: str, value: str | None) -> None:
    if value is not None and not is_repo_id(value):
        raise InputError(f"--{name} {value} cannot be a repository on the Hub: give owner/name")


def _check_copy(name: str, value: str | None, source: str, given: str | None) -> None:
    if value is None:
        return
    if given is None:
        raise InputError(f"--{name} {value}: there is no --{source} that could be a copy of it")
    if is_hub_id(given) and given != value:
        raise InputError(f"--{name} {value}: --{source} is {given}, which is on the Hub itself: leave it out")
