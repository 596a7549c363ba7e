# SPDX-License-Identifier: Apache-2.0
"""Compression in one call, and planning with a budget in plain words (RBA, arXiv 2410.04941)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..errors import InputError
from ..evaluation.model_cost import PieceCosts
from .adapters import adapter_for
from .analysis import Analysis, analyze, processor_of
from .arguments import CompressArguments, validate_compression
from .calibration import CALIBRATION_IMAGES, CalibrationSet, calibration_set
from .checkpoint import load_checkpoint
from .choice import Choice, network_pieces, refit_choice
from .converter import convert
from .heal import heal
from .limits import blank_pieces, budget_of, check_reachable
from .plan import CompressionPlan
from .saving import save_model
from .search import choose


@dataclass(frozen=True)
class Compressed:
    """A compressed network and how it came about.

    Attributes:
        model: in eval mode; a stock class wherever one can say it.
        processor: the original's image processor.
        choice: the plan with its maps, and all plans that were measured.
        analysis: what it was chosen from.
        heal_losses: of every step of the distillation.
    """

    model: PreTrainedModel
    processor: BaseImageProcessor
    choice: Choice
    analysis: Analysis
    heal_losses: tuple[float, ...] = ()

    @property
    def plan(self) -> CompressionPlan:
        """What was replaced."""
        return self.choice.plan

    def save(self, folder: str | Path) -> None:
        """Write weights, configuration, image processor and, where the model needs it, code, for `from_pretrained`.

        `hf-simprune compress` also evaluates and writes a model card.
        """
        save_model(self.model, self.processor, self.analysis.report.model, Path(folder))


def plan(
    analysis: Analysis,
    *,
    remove_blocks: int | None = None,
    max_params: str | float | None = None,
    max_flops: str | float | None = None,
    max_latency: str | float | None = None,
    max_cost: float | None = None,
    kinds: Sequence[str] | None = None,
    granularity: str | None = None,
    strategy: str = "measured",
    pieces: PieceCosts | None = None,
    seed: int = 0,
) -> Choice:
    """Choose what to replace, within exactly one budget.

    Candidate plans come from the costs of single spans by dynamic programming; the best are run and improved by local
    swaps, see `hf_simprune.rba.search.choose`, which takes further options.

    Args:
        analysis: from `analyze`.
        remove_blocks: blocks to remove.
        max_params, max_flops, max_latency: parameters, FLOPs or milliseconds an image that may remain: a number, or a
            share of the original such as "0.8x".
        max_cost: largest measured cost, in the unit of `analysis.report.cost_name`; as much as possible goes.
        kinds, granularity: span maps, and "block" or "half": those of the analysis if left out.
        strategy: "measured", or the papers' "br-contiguous" and "br-greedy" by block redundancy.
        pieces: costs of the network's parts; measured if left out.
        seed: of trained maps.

    Raises:
        InputError: none or several budgets, a bad option, or a budget that cannot be met.
    """
    settings = analysis.report.settings
    args = _arguments(
        remove_blocks=remove_blocks,
        max_params=max_params,
        max_flops=max_flops,
        max_latency=max_latency,
        max_cost=max_cost,
        map=list(kinds or settings["kinds"]),
        granularity=granularity or settings["granularity"],
        max_span=settings["max_span"],
        first_block=settings["first_block"],
        strategy=strategy,
        seed=seed,
    )
    args.rank = settings["rank"]
    pieces = pieces or network_pieces(analysis)
    budget = budget_of(args, pieces.total)
    return choose(
        analysis, budget, kinds=args.map, granularity=args.granularity, strategy=strategy, pieces=pieces, seed=seed
    )


def compress(
    model: PreTrainedModel | str,
    images: CalibrationSet | Dataset | Sequence[Any],
    *,
    remove_blocks: int | None = None,
    max_params: str | float | None = None,
    max_flops: str | float | None = None,
    max_latency: str | float | None = None,
    max_cost: float | None = None,
    kinds: Sequence[str] = ("fold",),
    granularity: str = "block",
    strategy: str = "measured",
    max_span: int = 6,
    rank: int | None = None,
    refit: bool = False,
    heal_steps: int = 0,
    processor: BaseImageProcessor | None = None,
    calibration_images: int = CALIBRATION_IMAGES,
    cost_images: int = 64,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Remove the blocks of a vision transformer that some images do not need, without training and without labels.

    Analyses the network, plans within exactly one budget and converts. Evaluate the result on images that are not
    among `images`, or use `hf-simprune compress`, which holds some out.

    Args:
        model: of a supported family, in eval mode, or the name or folder of one. It is not changed.
        images: a data set, or PIL images or uint8 (H, W, 3) arrays, of the kind the network will see; some hundreds.
        remove_blocks, max_params, max_flops, max_latency, max_cost: the budget, as for `plan`.
        kinds: span maps to choose from: "fold" and "identity" give a stock model, "linear", "low_rank", "mlp" and
            "res_mlp" one of this package.
        granularity: "block", or "half" to replace halves of blocks too.
        strategy: as for `plan`.
        max_span: longest span to replace, in blocks.
        rank: of "low_rank", an eighth of the width if left out.
        refit: fit the maps again one after the other, where that lowers the cost.
        heal_steps: steps of label-free distillation afterwards.
        processor: the model's image processor; read from where the model came from if left out.
        calibration_images: images to use, at most; two thirds fit the maps, a third chooses.
        cost_images: of the latter, on which each candidate is measured.
        batch_size: images a forward pass.
        seed: which images are used, and trained maps.
        progress: show bars on stderr.

    Raises:
        InputError: none or several budgets, one that cannot be met, a bad option, an unsupported family, or images
            that cannot be read.
        TrainingError: the distillation diverged.
    """
    args = _arguments(
        remove_blocks=remove_blocks,
        max_params=max_params,
        max_flops=max_flops,
        max_latency=max_latency,
        max_cost=max_cost,
        map=list(kinds),
        granularity=granularity,
        max_span=max_span,
        rank=rank,
        strategy=strategy,
        calibration_images=calibration_images,
        cost_images=cost_images,
        batch_size=batch_size,
        heal_steps=heal_steps,
        seed=seed,
    )
    if isinstance(model, str):
        checkpoint = load_checkpoint(model)
        model, processor = checkpoint.model, processor or checkpoint.processor
    adapter = adapter_for(model)
    if "low_rank" in kinds and args.rank is None:
        args.rank = max(1, adapter.width // 8)
    if isinstance(images, CalibrationSet):
        processor = processor or images.reader.processor
    else:
        processor = processor or processor_of(model)
        images = calibration_set(images, processor, calibration_images, seed=seed)
    pieces = blank_pieces(adapter, images.reader)
    check_reachable(args, adapter, budget_of(args, pieces.total), pieces)
    analysis = analyze(
        model,
        images,
        kinds=kinds,
        granularity=granularity,
        max_span=max_span,
        cost_images=cost_images,
        rank=args.rank,
        seed=seed,
        chunk_size=batch_size,
        progress=progress,
    )
    choice = choose(
        analysis,
        budget_of(args, pieces.total),
        kinds=args.map,
        granularity=granularity,
        strategy=strategy,
        pieces=pieces,
        seed=seed,
    )
    if refit:
        choice, _ = refit_choice(analysis, choice)
    compressed = convert(model, choice.plan, choice.maps)
    losses: list[float] = []
    if heal_steps:
        losses = heal(
            compressed,
            model,
            images,
            heal_steps,
            plan=choice.plan,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    return Compressed(compressed, processor, choice, analysis, tuple(losses))


def _arguments(**given: Any) -> CompressArguments:
    """The options of the command line, checked in the same way; what the command line takes as text may be a number.

    Raises:
        InputError: names the option, its value and what would be accepted.
    """
    for name in ("max_params", "max_flops", "max_latency"):
        if isinstance(given[name], (int, float)):
            given[name] = str(given[name])
    args = CompressArguments(output_dir="", dataset_name_or_path="", **given)
    try:
        validate_compression(args)
    except InputError as error:
        raise InputError(str(error).replace(", or a --plan file", "").replace(" and --plan", "")) from None
    return args
