# SPDX-License-Identifier: Apache-2.0
"""What a user has to be told in words: that a network has little to give, or that a plan takes too much."""

import math

from .comparison import Comparison
from .report import RedundancyReport, block_range, number


# A rule of thumb, not a law: what a cost in nats means for accuracy differs between networks and images, and only the
# evaluation tells. The cheapest single block of the redundant ImageNet DeiT-Tiny costs 0.09 nats.
LITTLE_TO_GIVE = 0.15  # nats
TOO_MUCH = 0.05  # top-1 lost, as a fraction
CHANGED_TOO_OFTEN = 0.2  # images of another class


def network_notes(report: RedundancyReport) -> list[str]:
    """Whether even the cheapest single block moves the outputs by more than `LITTLE_TO_GIVE` nats."""
    found = [
        (span.costs[kind], kind, span) for kind in report.map_kinds() if (span := report.cheapest(kind)) is not None
    ]
    if not found:
        return []
    cost, kind, span = min(found, key=lambda entry: entry[0])
    if not (math.isfinite(cost) and cost > LITTLE_TO_GIVE):
        return []
    where = block_range(span.start, span.end)
    return [
        f"This network has little to give: replacing even its cheapest block ({where}, by {kind}) moves the outputs "
        f"by {number(cost, 2)} nats, more than {LITTLE_TO_GIVE}. What that means for accuracy, an evaluation on your "
        "images tells."
    ]


def result_notes(
    training_free: Comparison, healed: Comparison | None = None, latency_limit: float | None = None
) -> list[str]:
    """Whether the result loses much, by its accuracy or, without labels, by the classes it changes; whether
    distillation helped; a missed latency.

    Args:
        healed: after distillation, which then is the result.
        latency_limit: largest ratio to the original's latency that was asked for.
    """
    notes = []
    comparison = training_free if healed is None else healed
    head = comparison.head or comparison.retrained
    if comparison.head is not None and comparison.head.original is None:
        head = comparison.retrained
    if head is not None and head.original is not None and head.compressed is not None:
        lost = head.original - head.compressed
        if lost > TOO_MUCH:
            notes.append(
                f"This costs {100 * lost:.1f} points of top-1 accuracy on the evaluation images, more than "
                f"{100 * TOO_MUCH:.0f}: name a smaller budget, or try --heal_steps."
            )
    elif comparison.agreement is not None and 1 - comparison.agreement > CHANGED_TOO_OFTEN:
        notes.append(
            f"{100 * (1 - comparison.agreement):.0f} % of the evaluation images get another class than from the "
            f"original, more than {100 * CHANGED_TOO_OFTEN:.0f} %: name a smaller budget, or try --heal_steps."
        )
    if healed is not None and healed.cost[0] >= training_free.cost[0]:
        notes.append(
            f"Distillation did not help: the cost went from {number(training_free.cost[0])} to "
            f"{number(healed.cost[0])}. Leave --heal_steps out, or give it more images."
        )
    if latency_limit is not None and comparison.latency_ratio[0] > latency_limit:
        notes.append(
            f"The latency asked for was missed: {comparison.latency_ratio[0]:.3f} times the original's was measured, "
            f"{latency_limit:.3f} times allowed; on a busy machine, run it again."
        )
    return notes
