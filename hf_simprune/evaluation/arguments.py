# SPDX-License-Identifier: Apache-2.0
"""Options of `evaluate`, and what can be said about them before a model or images are opened. Imports no torch."""

import math
from dataclasses import dataclass

from ..errors import InputError
from ..options.common import ALIASES, BenchmarkArguments, CheckpointArguments, DatasetArguments, check_seed
from ..options.fields import option
from ..options.parsing import Options


_LEAST = {"train_images": 3, "knn_k": 1, "batch_size": 1, "rounds": 1}


@dataclass(kw_only=True)
class BaselineArguments:
    """What the network is compared with."""

    _argument_group_name = "baseline"

    baseline: str | None = option(None, "Hub name or folder of a second network, evaluated on the same images.")
    baseline_revision: str | None = option(None, "Branch, tag or commit of it.")


@dataclass(kw_only=True)
class ProtocolArguments:
    """How it is evaluated."""

    _argument_group_name = "protocol"

    train_split: str = option("train", "Split of the labelled images that k-NN and linear head learn from.")
    train_images: int = option(10000, "Images of it, at most, drawn at random.")
    streaming: bool = option(False, "Read the data set as a stream, of which a sample is drawn and held in memory.")
    knn_k: int = option(20, "Neighbours that vote.")
    knn_temperature: float = option(0.07, "Temperature of their weights.")
    rounds: int = option(30, "How often the latency of one image is measured, both networks in turns.")
    batch_size: int = option(32, "Images a forward pass.")
    seed: int = option(42, "Fixes which images are used, and the intervals.")
    disable_tqdm: bool = option(False, "No progress bars.")


_GROUPS = (CheckpointArguments, BaselineArguments, DatasetArguments, ProtocolArguments, BenchmarkArguments)


@dataclass(kw_only=True)
class EvaluateArguments(
    CheckpointArguments, BaselineArguments, DatasetArguments, ProtocolArguments, BenchmarkArguments
):
    """Every option of `hf-simprune evaluate` and `recipes/evaluate.py`."""

    _argument_group_name = "evaluate"


EVALUATE_OPTIONS = Options(
    kind=EvaluateArguments,
    groups=_GROUPS,
    description="Say how good a vision transformer is on your labelled images, and what it costs: k-NN and a linear "
    "head on its frozen features, top-1 of its own head, parameters, FLOPs and latency. Images are prepared by the "
    "model's saved processor. With --baseline a second network stands beside it, with paired 95 % intervals.",
    required=("model_name_or_path", "dataset_name_or_path"),
    aliases=ALIASES,
    positional=("model_name_or_path",),
    prog="hf-simprune evaluate",
    examples=(
        "hf-simprune evaluate outputs/smaller --dataset path/to/images --eval_split validation",
        "hf-simprune evaluate outputs/smaller --baseline facebook/deit-tiny-patch16-224 --dataset path/to/images",
        "hf-simprune evaluate user/my-model --dataset user/images --json > results.json",
    ),
    json=True,
)


def validate_evaluation(args: EvaluateArguments) -> None:
    """Check the options that need neither model nor data.

    Raises:
        InputError: names the option, its value and what would be accepted.
    """
    for name, least in _LEAST.items():
        if vars(args)[name] < least:
            raise InputError(f"--{name} {vars(args)[name]}: must be {least} or more")
    check_seed(args.seed)
    if not (math.isfinite(args.knn_temperature) and args.knn_temperature > 0):
        raise InputError(f"--knn_temperature {args.knn_temperature}: must be a finite number above 0")
    if args.baseline is None and args.baseline_revision is not None:
        raise InputError(f"--baseline_revision {args.baseline_revision}: there is no --baseline that could have it")
    from ..hub.card_options import check_benchmark

    evaluated = args.eval_dataset_name_or_path or args.dataset_name_or_path
    check_benchmark(args.eval_dataset_id, args.eval_task_id, evaluated, args.eval_split)
