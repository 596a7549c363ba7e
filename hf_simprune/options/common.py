# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .fields import option, required


# Short names on the command line and in YAML files.
ALIASES = {"dataset": "dataset_name_or_path", "output": "output_dir"}


MOST_SEED = 2**63 - 1


def check_seed(seed: int, most: int = MOST_SEED) -> None:
    """Raises InputError for a seed that a generator of random numbers would not take."""
    if not 0 <= seed <= most:
        raise InputError(f"--seed {seed}: must be from 0 to {most}")


def check_revision(name: str, revision: str | None, name_or_path: str) -> None:
    """Raises InputError for a revision of what lies on this disk, where it would be ignored; `main` is any model's."""
    if revision in (None, "main"):
        return
    with suppress(OSError, RuntimeError):  # no path at all; whoever opens it says so
        if Path(name_or_path).expanduser().exists():
            raise InputError(f"--{name} {revision}: {name_or_path} is on this disk, which has no revisions")


@dataclass(kw_only=True)
class OutputArguments:
    """Where the result goes."""

    _argument_group_name = "output"

    output_dir: str = required("Folder the result is written to. Required.")
    overwrite_output_dir: bool = option(False, "Replace what an earlier run wrote there; other files stay.")


@dataclass(kw_only=True)
class DatasetArguments:
    """Which images."""

    _argument_group_name = "data set"

    dataset_name_or_path: str = required("Hub name, parquet file or folder, or a folder of images. Required.")
    dataset_config_name: str | None = option(None, "Configuration of a Hub data set.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub data set.")
    eval_split: str | None = option(
        None, "Split to evaluate on (training holds out a tenth of its rows, compression a third)."
    )
    eval_dataset_name_or_path: str | None = option(
        None, "Another data set to evaluate on; its split is --eval_split, or train."
    )
    max_eval_samples: int | None = option(None, "Evaluate on only so many images (compression: at most 5000).")
    image_column: str | None = option(None, "Column of the images; needed where several would do.")
    label_column: str | None = option(None, "Column of the class labels, for evaluation only.")
    trust_remote_code: bool = option(False, "Allow code from the Hub to run.")
    token: str | None = option(None, "Hub token; by default the one stored by `hf auth login`.")


@dataclass(kw_only=True)
class HubReadingArguments:
    """Reading from the Hub."""

    _argument_group_name = "Hub"

    token: str | None = option(None, "Hub token; by default the one stored by `hf auth login`.")


@dataclass(kw_only=True)
class CheckpointArguments:
    """Which trained network."""

    _argument_group_name = "checkpoint"

    model_name_or_path: str | None = option(None, "Hub name or folder of the network.")
    model_revision: str | None = option(None, "Branch, tag or commit of a Hub model.")


@dataclass(kw_only=True)
class HubArguments:
    """Publishing the result."""

    _argument_group_name = "Hub"

    push_to_hub: bool = option(False, "Upload the output folder, without its checkpoints.")
    hub_model_id: str | None = option(None, "Repository; by default the output folder's name.")
    hub_private_repo: bool = option(False, "Make the repository private.")


@dataclass(kw_only=True)
class CardArguments:
    """What the model card says that only you can know."""

    _argument_group_name = "model card"

    license: str | None = option(
        None, "Licence of the weights, by its Hub identifier, as apache-2.0 (the starting model's, or unknown)."
    )
    base_model_id: str | None = option(None, "Hub id of the starting model, where a copy of it is on this disk.")
    dataset_id: str | None = option(None, "Hub id of the data set, where a copy of it is on this disk.")


@dataclass(kw_only=True)
class BenchmarkArguments:
    """Whether the score goes to the leaderboard of a benchmark on the Hub."""

    _argument_group_name = "benchmark"

    eval_dataset_id: str | None = option(
        None, "Hub id of the benchmark that --eval_split is of: its score is written to .eval_results too."
    )
    eval_task_id: str = option("default", "Task of that benchmark, as its eval.yaml names it.")
