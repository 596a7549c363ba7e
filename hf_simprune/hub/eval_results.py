# SPDX-License-Identifier: Apache-2.0
"""Results as the Hub reads them: entries of a card's model-index, and `.eval_results/*.yaml` for named benchmarks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from ..options.common import DatasetArguments
from .hub_names import is_hub_id, slug


EVAL_RESULTS = ".eval_results"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Images that results were measured on.

    Attributes:
        dataset: name of the data set in words.
        split: that the images come from.
        dataset_id: the data set's Hub id, if it has one.
        config, revision: of the data set on the Hub.
    """

    dataset: str
    split: str
    dataset_id: str | None = None
    config: str | None = None
    revision: str | None = None

    def accuracy(self, what: str, value: float, images: int, protocol: str) -> EvalResult:
        """An entry for the card's model-index.

        Args:
            what: such as "top-1, original head"; the number of images is added to it.
            value: fraction classified correctly.
            images: how many were classified.
            protocol: how, in words, such as "k-NN classification of frozen features".
        """
        return EvalResult(
            task_type="image-classification",
            task_name=protocol,
            dataset_type=self.dataset_id or slug(self.dataset),
            dataset_name=self.dataset,
            dataset_config=self.config,
            dataset_split=self.split,
            dataset_revision=self.revision,
            metric_type="accuracy",
            metric_name=f"{what}, {images:,} images",
            # of the metric, not of the data set: results on different numbers of its images share one data set entry
            metric_args={"num_samples": images},
            metric_value=round(float(value), 4),
        )


def evaluated_images(args: DatasetArguments, drawn_from: str, benchmark: str | None = None) -> Evaluated:
    """What the options say results are measured on.

    Images on this disk are not given the id of the data set they may be a copy of, for their splits are not its.

    Args:
        args: the data set and what is evaluated on.
        drawn_from: split that images are held out from where no other is named.
        benchmark: Hub id of the benchmark that the evaluation is one of.
    """
    other = args.eval_dataset_name_or_path
    name = other or args.dataset_name_or_path
    same = other is None or other == args.dataset_name_or_path
    return Evaluated(
        dataset=Path(name).name,
        split=args.eval_split or (drawn_from if other is None else "train"),
        dataset_id=name if is_hub_id(name) else benchmark,
        config=args.dataset_config_name if same else None,
        revision=args.dataset_revision if same else None,
    )


def benchmark_entry(result: EvalResult, dataset_id: str, task_id: str = "default") -> EvalResultEntry:
    """The leaderboard entry of a result; its notes name the metric, the split and the number of images.

    Args:
        result: as [`Evaluated.accuracy`] makes it; its value is a fraction and stays one.
        dataset_id: Hub id of the benchmark's data set.
        task_id: of the benchmark, as its `eval.yaml` names it.
    """
    revision = result.dataset_revision or ""
    return EvalResultEntry(
        dataset_id=dataset_id,
        task_id=task_id,
        value=result.metric_value,
        dataset_revision=revision if _COMMIT.fullmatch(revision) else None,
        date=datetime.now(timezone.utc).date().isoformat(),
        notes=f"{result.task_name}: {result.metric_name} of {result.dataset_split}, as a fraction",
    )


def write_benchmark_entries(folder: str | Path, entries: Sequence[EvalResultEntry]) -> list[Path]:
    """Write `.eval_results/<owner>--<name>--<task>.yaml` into a model's folder, a file an entry; returns the paths."""
    target = Path(folder) / EVAL_RESULTS
    paths = []
    for entry in entries:
        target.mkdir(parents=True, exist_ok=True)
        path = target / f"{slug(entry.dataset_id.replace('/', '--'))}--{slug(entry.task_id)}.yaml"
        content: list[dict[str, Any]] = eval_result_entries_to_yaml([entry])
        path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=119), encoding="utf-8")
        paths.append(path)
    return paths
