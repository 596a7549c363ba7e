# SPDX-License-Identifier: Apache-2.0
"""What a finished compression leaves in numbers: compression.json."""

import math
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from ..hub.facts import hardware, launch_words, shown_command, versions
from .analysis import Analysis
from .arguments import CompressArguments
from .choice import Choice
from .comparison import Comparison
from .planner import Budget
from .run_images import RunImages


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
        "command": typed_command(args),
        "hardware": hardware(),
        "versions": versions(),
    }
    return _plain(record)


def typed_command(args: CompressArguments) -> str:
    """What starts the same run, without access tokens and folders of this machine."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return shown_command(launch_words(sys.argv, "compress", args, processes))


def _plain(value: Any) -> Any:
    """For JSON, in which numbers that are not finite are null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
