# SPDX-License-Identifier: Apache-2.0
"""What a finished compression leaves in words and numbers: compression.json and the model card."""

import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..hub.compression_card import CompressionCard, render_compression_card
from ..hub.facts import hardware, is_hub_id, launch_command, versions
from ..hub.model_card import masked
from .adapters import Adapter
from .analysis import Analysis
from .arguments import CompressArguments
from .candidates import TRAINED_MAPS
from .checkpoint import loader_of
from .choice import Choice
from .comparison import Accuracy, Comparison
from .output import PICTURE
from .plan import CompressionPlan
from .planner import Budget
from .report import block_range
from .run_images import RunImages
from .saving import is_stock


# Where a run reads and writes, and what does not change its result.
_NOT_SHOWN = (
    "output_dir", "overwrite_output_dir", "dataset_name_or_path", "eval_dataset_name_or_path", "model_name_or_path",
    "token", "disable_tqdm", "push_to_hub", "hub_model_id", "hub_private_repo", "plan",
)  # fmt: skip
_CHOSEN = {
    "measured": "chosen by its measured effect on the outputs",
    "br-contiguous": "chosen by block redundancy (the best contiguous span)",
    "br-greedy": "chosen by block redundancy (the best single blocks)",
}


@dataclass(frozen=True)
class Outcome:
    """What a run made.

    Attributes:
        choice: the plan and its maps.
        budget: None for a plan that was given.
        refit_cost: of the maps fitted again, kept or not; None where that was not asked for.
        model: the compressed network.
        healed: a distilled copy and the losses, if it was asked for.
    """

    choice: Choice
    budget: Budget | None
    refit_cost: float | None
    model: PreTrainedModel
    healed: tuple[PreTrainedModel, list[float]] | None


@dataclass(frozen=True)
class Result:
    """What was made and measured; `seconds` are those of the parts after the analysis."""

    outcome: Outcome
    comparison: Comparison
    healed: Comparison | None
    notes: tuple[str, ...]
    seconds: dict[str, float]


def compression_record(
    args: CompressArguments, images: RunImages, analysis: Analysis, result: Result
) -> dict[str, Any]:
    """The content of compression.json."""
    outcome, choice = result.outcome, result.outcome.choice
    record = {
        "model": args.model_name_or_path,
        "model_revision": args.model_revision,
        "plan": choice.plan.to_dict(),
        "budget": None if outcome.budget is None else asdict(outcome.budget),
        "strategy": args.strategy if outcome.budget is not None else "given",
        "cost_name": analysis.report.cost_name,
        "selection_cost": choice.cost,
        "pooled_cost": choice.measured.pooled_cost,
        "predicted_cost": choice.predicted_cost,
        "measured_plans": [
            {
                "plan": entry.plan.to_dict(),
                "source": entry.source,
                "predicted_cost": entry.predicted_cost,
                "cost": entry.cost,
                "pooled_cost": entry.pooled_cost,
                "relative_error": entry.relative_error,
            }
            for entry in choice.table
        ],
        "refit": None
        if outcome.refit_cost is None
        else {"cost": outcome.refit_cost, "kept": choice.measured.source == "refit"},
        "training_free": result.comparison.to_dict(),
        "heal_steps": args.heal_steps,
        "healed": None if result.healed is None else result.healed.to_dict(),
        "heal_losses": [] if outcome.healed is None else outcome.healed[1],
        "notes": list(result.notes),
        "data": {
            **images.calibration.to_dict(),
            "evaluated_on": images.evaluated_on,
            "evaluation_indices": list(images.evaluation.rows),
        },
        "seconds": {**analysis.report.seconds, **result.seconds},
        "plain_forward_seconds": analysis.report.plain_forward_seconds,
        "options": {key: value for key, value in asdict(args).items() if key != "token"},
        "command": typed_command(),
        "hardware": hardware(),
        "versions": versions(),
    }
    return _plain(record)


def compression_card(
    args: CompressArguments,
    model: PreTrainedModel,
    original: Adapter,
    images: RunImages,
    result: Result,
    repo_id: str | None = None,
) -> str:
    """The text of README.md."""
    plan = result.outcome.choice.plan
    auto_class = loader_of(type(model).__name__).__name__
    variable, output = _snippet(original, auto_class)
    base_model = args.model_name_or_path if is_hub_id(args.model_name_or_path) else None
    calibration = images.calibration
    trained = any(item.map in TRAINED_MAPS for item in plan.items)
    card = CompressionCard(
        name=(repo_id or Path(args.output_dir).resolve().name).split("/")[-1],
        model_id=repo_id or args.output_dir,
        model_class=type(model).__name__,
        auto_class=auto_class,
        result=variable,
        output=output,
        stock=is_stock(model),
        original=Path(args.model_name_or_path).resolve().name if base_model is None else base_model,
        base_model=base_model,
        depth=plan.depth,
        kept=plan.depth - len(plan.removed_blocks),
        chosen=_CHOSEN[args.strategy] if result.outcome.budget is not None else "named in a plan",
        fitted="by maps fitted to its activations, some of them trained" if trained else "in closed form, untrained",
        replaced=replaced_rows(plan),
        dataset=Path(args.dataset_name_or_path).name,
        dataset_id=args.dataset_name_or_path if is_hub_id(args.dataset_name_or_path) else None,
        calibration=f"{len(calibration.fit) + len(calibration.select)} images",
        evaluated_on=images.evaluated_on,
        results=result.comparison.rows(),
        healed=result.healed.rows() if result.healed is not None else (),
        heal_steps=args.heal_steps,
        notes=(*result.notes, *missing_accuracies(result.comparison)),
        command=typed_command(),
        seed=args.seed,
        hardware=hardware(),
        versions=versions(),
        settings={key: value for key, value in asdict(args).items() if key not in _NOT_SHOWN and value is not None},
        picture=PICTURE,
    )
    return render_compression_card(card)


def replaced_rows(plan: CompressionPlan) -> list[tuple[str, str]]:
    """What went and the kind of map in its place, in order."""
    rows = []
    for span in plan.spans:
        rank = "" if span.rank is None else f" of rank {span.rank}"
        blocks = "block" if span.length == 1 else "blocks"
        where = f", into the MLP of block {span.start - 1}" if span.map == "fold" else ""
        rows.append((f"{blocks} {block_range(span.start, span.end)}", f"{span.map}{rank}{where}"))
    return rows + [(f"{half.half} of block {half.block}", half.map) for half in plan.halves]


def typed_command() -> str:
    """What was typed, without access tokens."""
    program, *words = sys.argv
    if Path(program).stem in ("hf-simprune", "cli"):
        return masked(launch_command([program, *words]).replace(f"python {program}", "hf-simprune", 1))
    return masked(launch_command(sys.argv, int(os.environ.get("WORLD_SIZE", "1"))))


def missing_accuracies(comparison: Comparison) -> list[str]:
    """Why an accuracy is not among the results."""
    sides: dict[str, Accuracy | None] = {
        "the original head": comparison.head,
        "a re-trained linear head": comparison.retrained,
    }
    return [
        f"No accuracy of {name}: {accuracy.reason}."
        for name, accuracy in sides.items()
        if accuracy is not None and accuracy.reason
    ]


def _snippet(original: Adapter, auto_class: str) -> tuple[str, str]:
    """Variable and expression that show what the network gives."""
    if original.head == "classifier":
        return "label", "model.config.id2label[model(**inputs).logits.argmax(-1).item()]"
    if auto_class == "CLIPVisionModelWithProjection":
        return "features", "model(**inputs).image_embeds"
    if original.head == "projection":
        return "features", "model.get_image_features(**inputs).pooler_output"
    if original.family in ("vit", "deit"):
        return "features", "model(**inputs).last_hidden_state[:, 0]"
    return "features", "model(**inputs).pooler_output"


def _plain(value: Any) -> Any:
    """For JSON, in which numbers that are not finite are null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
