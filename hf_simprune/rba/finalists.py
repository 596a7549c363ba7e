# SPDX-License-Identifier: Apache-2.0
"""A second look at the best plans of a search: on the fit images too, each with maps that were not fitted on it."""

from collections.abc import Sequence

from .analysis import Analysis
from .choice import MeasuredPlan
from .maps import FittedMaps, fit_all
from .measure import measure_plans
from .plan import Half, Span


FINALISTS = 6


def pooled_costs(
    analysis: Analysis, rows: Sequence[MeasuredPlan], stand_ins: dict[Span | Half, Span | Half]
) -> list[float] | None:
    """Cost of each plan over all calibration images; None where the fit images are too few to be halved.

    Some dozens of selection images do not tell plans apart that differ by a tenth. The even fit images are run with
    maps fitted on the odd ones and the other way round, so that no image meets a map that was fitted on it, and the
    mean is taken over these and the selection images.

    Args:
        rows: measured on the selection images.
        stand_ins: the closed-form item for each item of the plans, itself or what stands in for a trained map.
    """
    images = analysis.images
    # the pass that fitted the maps has met them all: what it could not read is no part of either half
    readable = [index for index in images.fit if index not in images.reader.unreadable]
    halves = [[index for index in readable if index % 2 == parity] for parity in (0, 1)]
    if not rows or not all(halves):
        return None
    parts = analysis.moments.halved
    if min(part.count for part in parts) < analysis.adapter.width:
        return None
    settings = analysis.report.settings
    items = {stand_ins[item] for row in rows for item in row.plan.items}
    selected = sum(index not in images.reader.unreadable for index in images.select)
    sums = [row.cost * selected for row in rows]
    for indices, other in zip(halves, reversed(parts)):
        fitted = fit_all(sorted(items, key=str), other, settings["ridge"], settings["bias"])
        maps: FittedMaps = {item: fitted[stand_in] for item, stand_in in stand_ins.items() if stand_in in fitted}
        runs = [(row.plan, maps) for row in rows]
        for n, found in enumerate(measure_plans(analysis.bench, runs, indices, "finalists")):
            sums[n] += found.cost * len(indices)
    total = selected + len(readable)
    return [value / total for value in sums]
