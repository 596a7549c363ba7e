# SPDX-License-Identifier: Apache-2.0
"""A plan with its maps and what it was measured to cost."""

import math
from dataclasses import dataclass, replace

from accelerate.utils import broadcast_object_list

from ..evaluation.model_cost import PieceCosts, gains, piece_costs
from .analysis import Analysis
from .maps import FittedMaps
from .measure import measure_plans
from .plan import CompressionPlan
from .plan_maps import plan_maps
from .planner import Candidate, ScoredPlan, score_plan
from .refit import sequential_refit


@dataclass(frozen=True)
class MeasuredPlan:
    """One plan that was run: its predicted and measured cost (see `RedundancyReport.cost_name`), and what it saves.

    `cost` is the mean over the selection images; `pooled_cost`, of a search's finalists, that over all calibration
    images (see `pooled_costs`). `source` says where it came from: planned, contiguous, swap, br-contiguous, br-greedy
    or given.
    """

    plan: CompressionPlan
    predicted_cost: float
    cost: float
    relative_error: float
    source: str
    blocks: int
    params: int
    macs: int
    seconds: float
    pooled_cost: float | None = None


@dataclass(frozen=True)
class Choice:
    """The plan chosen, its maps, and all plans that were measured on the whole selection set, cheapest first."""

    plan: CompressionPlan
    maps: FittedMaps
    measured: MeasuredPlan
    table: tuple[MeasuredPlan, ...]

    @property
    def cost(self) -> float:
        """Mean cost on the selection images."""
        return self.measured.cost

    @property
    def predicted_cost(self) -> float:
        """Sum of the costs of the plan's parts; NaN where one was not measured."""
        return self.measured.predicted_cost


def network_pieces(analysis: Analysis, images: int = 1) -> PieceCosts:
    """Parameters, MACs and time of the network's parts at the size of the calibration images; alike on all processes.

    Times are of batches of `images`.
    """
    bench = analysis.bench
    chunk = next(bench.images.chunks(bench.images.select, images))
    found = [piece_costs(bench.adapter, chunk.pixel_values.to(bench.adapter.model.device))]
    if bench.ranks[1] > 1:
        broadcast_object_list(found)
    return found[0]


def measure_choice(
    analysis: Analysis,
    plan: CompressionPlan,
    maps: FittedMaps | None = None,
    *,
    pieces: PieceCosts | None = None,
    source: str = "given",
    seed: int = 0,
) -> Choice:
    """A plan written by hand or by other means, with maps made for it where none are given, measured like a choice.

    Raises:
        InputError: the plan does not fit the network.
    """
    maps = plan_maps(analysis, plan, seed) if maps is None else maps
    pieces = pieces or network_pieces(analysis)
    known = {item: measured.cost for item, measured in analysis.costs.items()}
    table = {}
    for item in plan.items:
        saved = gains(item, pieces)
        cost = known.get(item, math.nan)
        table[item] = Candidate(item, cost, saved.blocks, saved.params, saved.macs, saved.seconds)
    [found] = measure_plans(analysis.bench, [(plan, maps)], analysis.images.select, source)
    measured = measured_row(score_plan(plan, table), found.cost, found.relative_error, source)
    return Choice(plan, maps, measured, (measured,))


def refit_choice(analysis: Analysis, choice: Choice) -> tuple[Choice, float]:
    """`choice` with its maps fitted again in sequence if that costs less on the selection images, else as it was.

    Also the cost measured for the refitted maps, kept or not.
    """
    settings = analysis.report.settings
    maps = sequential_refit(analysis.bench, choice.plan, choice.maps, settings["ridge"], settings["bias"])
    [found] = measure_plans(analysis.bench, [(choice.plan, maps)], analysis.images.select, "refit")
    if not found.cost < choice.cost:
        return choice, found.cost
    measured = replace(choice.measured, cost=found.cost, relative_error=found.relative_error, source="refit")
    return Choice(choice.plan, maps, measured, (measured, *choice.table)), found.cost


def measured_row(scored: ScoredPlan, cost: float, relative_error: float, source: str) -> MeasuredPlan:
    """A plan that was run."""
    return MeasuredPlan(
        scored.plan,
        scored.predicted_cost,
        cost,
        relative_error,
        source,
        scored.blocks,
        scored.params,
        scored.macs,
        scored.seconds,
    )
