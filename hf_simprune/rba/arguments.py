# SPDX-License-Identifier: Apache-2.0
"""Options of `analyze` and `compress`, and what can be said about them before a model or images are opened."""

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import InputError
from ..options.common import (
    ALIASES,
    BenchmarkArguments,
    CardArguments,
    CheckpointArguments,
    DatasetArguments,
    HubArguments,
    OutputArguments,
    check_seed,
)
from ..options.fields import option
from ..options.parsing import Options
from .plan import SPAN_MAPS, CompressionPlan


GRANULARITIES = ("block", "half")
STRATEGIES = ("measured", "br-contiguous", "br-greedy")
BUDGETS = ("remove_blocks", "max_params", "max_flops", "max_latency", "max_cost")
_LEAST = {"calibration_images": 3, "cost_images": 1, "max_span": 1, "batch_size": 1}
_SHARE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)x")


@dataclass(kw_only=True)
class AnalysisArguments:
    """What is measured, and on how many images."""

    _argument_group_name = "analysis"

    calibration_split: str = option("train", "Split the images come from that maps are fitted and chosen on.")
    streaming: bool = option(
        False, "Read the data set as a stream: a sample of it is drawn and held in memory, the rest stays where it is."
    )
    calibration_images: int = option(500, "Images to calibrate on, or all there are; a third of them selects.")
    cost_images: int = option(64, "Selection images on which every candidate's cost is measured.")
    map: list[str] | None = option(
        None,
        "Maps that may replace a span, one or several of fold linear identity low_rank mlp res_mlp (to analyze: fold "
        "linear; to compress: fold, whose result is a stock model). mlp and res_mlp are trained once chosen; before "
        "that, linear stands in for them.",
        SPAN_MAPS,
    )
    rank: int | None = option(None, "Rank of low_rank maps (an eighth of the width).")
    granularity: str = option(
        "block", "block: whole blocks go; half: attention or MLP of a block may go alone.", GRANULARITIES
    )
    max_span: int = option(6, "Most blocks in a row whose cost is measured.")
    ridge: float = option(1e-4, "Ridge of the closed-form maps, relative to the mean variance of a feature.")
    bias: bool = option(True, "Fit a bias too; false with --ridge 0 is the published least squares.")
    first_block: bool = option(False, "Offer block 0 too, which networks rarely bear to lose.")
    batch_size: int = option(32, "Images a forward pass.")
    seed: int = option(42, "Fixes which images are used, and trained maps.")
    disable_tqdm: bool = option(False, "No progress bars.")


@dataclass(kw_only=True)
class BudgetArguments:
    """How much has to go: one of these, or a plan."""

    _argument_group_name = "budget (exactly one)"

    remove_blocks: int | None = option(None, "Blocks to remove.")
    max_params: str | None = option(None, "Parameters that may remain: a number, or a share such as 0.8x.")
    max_flops: str | None = option(None, "FLOPs an image that may remain: a number, or a share such as 0.8x.")
    max_latency: str | None = option(None, "Time an image may take: milliseconds, or a share such as 0.8x.")
    max_cost: float | None = option(None, "Largest sum of measured costs; as much as possible goes within it.")
    plan: str | None = option(None, "A plan file, such as one written by hand, in place of a budget.")


@dataclass(kw_only=True)
class MethodArguments:
    """How it is chosen, and what is done afterwards."""

    _argument_group_name = "method"

    strategy: str = option(
        "measured",
        "measured: cheapest by measured cost; br-contiguous, br-greedy: by block redundancy, as published.",
        STRATEGIES,
    )
    refit: bool = option(False, "Fit the maps again one after the other; kept only if the held-out cost falls.")
    heal_steps: int = option(0, "Steps of label-free distillation from the original network afterwards.")


ANALYZE_GROUPS = (OutputArguments, DatasetArguments, CheckpointArguments, AnalysisArguments)
COMPRESS_GROUPS = (
    OutputArguments,
    DatasetArguments,
    CheckpointArguments,
    BudgetArguments,
    MethodArguments,
    AnalysisArguments,
    CardArguments,
    BenchmarkArguments,
    HubArguments,
)


@dataclass(kw_only=True)
class AnalyzeArguments(OutputArguments, DatasetArguments, CheckpointArguments, AnalysisArguments):
    """Every option of `hf-simprune analyze`."""

    _argument_group_name = "analyze"


@dataclass(kw_only=True)
class CompressArguments(
    OutputArguments,
    DatasetArguments,
    CheckpointArguments,
    BudgetArguments,
    MethodArguments,
    AnalysisArguments,
    CardArguments,
    BenchmarkArguments,
    HubArguments,
):
    """Every option of `hf-simprune compress` and `recipes/compress.py`."""

    _argument_group_name = "compress"


_REQUIRED = ("model_name_or_path", "dataset_name_or_path", "output_dir")
ANALYZE_OPTIONS = Options(
    kind=AnalyzeArguments,
    groups=ANALYZE_GROUPS,
    description="Measure which blocks of a vision transformer matter on your images: a table, redundancy.json and "
    "redundancy.png. Nothing is removed.",
    required=_REQUIRED,
    aliases=ALIASES,
    positional=("model_name_or_path",),
    prog="hf-simprune analyze",
    examples=(
        "hf-simprune analyze facebook/deit-tiny-patch16-224 --dataset path/to/images --output analysis",
        "hf-simprune analyze path/to/model --dataset user/images --granularity half --output analysis --json",
    ),
    json=True,
)
COMPRESS_OPTIONS = Options(
    kind=CompressArguments,
    groups=COMPRESS_GROUPS,
    description="Remove the blocks of a vision transformer that your images do not need, within the budget you name. "
    "No training, no labels needed; the result loads with from_pretrained.",
    required=_REQUIRED,
    aliases=ALIASES,
    positional=("model_name_or_path",),
    prog="hf-simprune compress",
    examples=(
        "hf-simprune compress facebook/deit-tiny-patch16-224 --dataset path/to/images --remove_blocks 2 --output out",
        "hf-simprune compress path/to/model --dataset user/images --max_flops 0.8x --granularity half --output out",
        "hf-simprune compress path/to/model --dataset path/to/images --plan plan.json --output out",
    ),
    json=True,
)


@dataclass(frozen=True)
class Limit:
    """What may remain: an amount, or a share of what the original has."""

    amount: float
    is_share: bool

    def remaining(self, original: float) -> float:
        """The amount that may remain of `original`."""
        return self.amount * original if self.is_share else self.amount


def parse_limit(name: str, text: str) -> Limit:
    """`0.8x` or a number above 0.

    Raises:
        InputError: neither, or a share that is not between 0 and 1.
    """
    share = _SHARE.fullmatch(text.strip())
    try:
        amount = float(share[1] if share else text)
    except ValueError:
        amount = math.nan
    if not (math.isfinite(amount) and amount > 0):
        raise InputError(f"--{name} {text}: give a number above 0, or a share of the original such as 0.8x")
    if share and amount >= 1:
        raise InputError(f"--{name} {text}: a share must be below 1x, or nothing would have to go")
    return Limit(amount, share is not None)


def validate_analysis(args: AnalyzeArguments | CompressArguments) -> None:
    """Check the options of an analysis that need neither model nor data.

    Raises:
        InputError: names the option, its value and what would be accepted.
    """
    for entry in fields(args):
        value = vars(args)[entry.name]
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{entry.name} {value}: must be a finite number")
    for name, least in _LEAST.items():
        if vars(args)[name] < least:
            raise InputError(f"--{name} {vars(args)[name]}: must be {least} or more")
    check_seed(args.seed)
    if args.max_eval_samples is not None and args.max_eval_samples < 1:
        raise InputError(f"--max_eval_samples {args.max_eval_samples}: must be 1 or more")
    _check_evaluation_is_apart(args)
    if args.ridge < 0:
        raise InputError(f"--ridge {args.ridge:g}: must be 0 or more")
    if args.granularity not in GRANULARITIES:
        raise InputError(f"--granularity {args.granularity} is unknown: choose one of {', '.join(GRANULARITIES)}")
    kinds = args.map or []
    for kind in kinds:
        if kind not in SPAN_MAPS:
            raise InputError(f"--map {kind} is unknown: choose from {', '.join(SPAN_MAPS)}")
    if len(set(kinds)) < len(kinds):
        raise InputError(f"--map {' '.join(kinds)}: name each kind once")
    if args.rank is not None and args.rank < 1:
        raise InputError(f"--rank {args.rank}: must be 1 or more")
    if args.rank is not None and "low_rank" not in kinds:
        raise InputError(f"--rank {args.rank} is for low_rank maps: add --map low_rank, or leave it out")


def _check_evaluation_is_apart(args: AnalyzeArguments | CompressArguments) -> None:
    """Raises InputError where the images to evaluate on would be images that were calibrated on."""
    other = args.eval_dataset_name_or_path
    if other is not None and _place(other) != _place(args.dataset_name_or_path):
        return
    split = args.eval_split or (None if other is None else "train")
    if split is None:
        return
    ours, theirs = map(_slices, (args.calibration_split, split))
    # of two different slices only the data set can tell whether they overlap
    whole = {name for name, part in (*ours, *theirs) if not part}
    if ours & theirs or whole & {name for name, _ in ours} & {name for name, _ in theirs}:
        raise InputError(
            f"--eval_split {split} is the calibration split too: name another, or leave it out to hold a third of the "
            "images out"
        )


def _slices(split: str) -> set[tuple[str, str]]:
    """Name and slice of every part of a split: "train[:90%]+test" is ("train", ":90%]") and ("test", "")."""
    return {part.strip().partition("[")[::2] for part in split.split("+")}


def _place(name_or_path: str) -> str:
    """One name for a local path however it is written; a Hub name as it is."""
    path = Path(name_or_path).expanduser()
    return str(path.resolve()) if path.exists() else name_or_path


def validate_compression(args: CompressArguments) -> None:
    """Check all options of `compress` that need neither model nor data.

    Raises:
        InputError: names the option, its value and what would be accepted.
    """
    from ..hub.card_options import check_card_options  # imports huggingface_hub, which --help does without

    validate_analysis(args)
    check_card_options(args)
    given = [name for name in (*BUDGETS, "plan") if vars(args)[name] is not None]
    accepted = ", ".join(f"--{name}" for name in BUDGETS)
    if not given:
        raise InputError(f"no budget: give exactly one of {accepted}, or a --plan file")
    if len(given) > 1:
        raise InputError(f"--{given[0]} and --{given[1]} exclude each other: give one of {accepted} and --plan")
    if args.remove_blocks is not None and args.remove_blocks < 1:
        raise InputError(f"--remove_blocks {args.remove_blocks}: must be 1 or more")
    if args.max_cost is not None and args.max_cost <= 0:
        raise InputError(f"--max_cost {args.max_cost:g}: must be above 0")
    for name in ("max_params", "max_flops", "max_latency"):
        if vars(args)[name] is not None:
            parse_limit(name, vars(args)[name])
    if args.strategy not in STRATEGIES:
        raise InputError(f"--strategy {args.strategy} is unknown: choose one of {', '.join(STRATEGIES)}")
    if args.strategy != "measured" and args.remove_blocks is None:
        raise InputError(f"--strategy {args.strategy} removes a number of blocks: give --remove_blocks")
    if args.strategy != "measured" and (len(args.map or []) > 1 or args.granularity == "half"):
        raise InputError(f"--strategy {args.strategy} takes one --map and --granularity block")
    if args.heal_steps < 0:
        raise InputError(f"--heal_steps {args.heal_steps}: must be 0 or more")
    if args.plan is not None:
        if not Path(args.plan).is_file():
            raise InputError(f"--plan {args.plan}: there is no such file")
        CompressionPlan.load(args.plan)
