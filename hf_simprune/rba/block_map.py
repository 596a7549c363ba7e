# SPDX-License-Identifier: Apache-2.0
"""A compression plan as a row of blocks, in plain text: what stays, what went, what stands in its place."""

from .plan import CompressionPlan


_A_ROW = 24
_KEPT, _REMOVED = "■", "□"
_LEGEND = {
    _KEPT: "kept",
    "◧": "kept, and its MLP also does the work of the removed blocks after it (fold)",
    _REMOVED: "removed",
    "▣": "removed, a map in its place and in that of the removed blocks after it",
    "A": "kept, its attention replaced",
    "M": "kept, its MLP replaced",
    "B": "kept, both its halves replaced",
}


def block_map(plan: CompressionPlan) -> str:
    """Every block's number above its sign, 24 blocks a row, and what the signs mean."""
    signs = [_KEPT] * plan.depth
    for span in plan.spans:
        signs[span.start : span.end] = [_REMOVED] * span.length
        if span.map == "fold":
            signs[span.start - 1] = "◧"
        elif span.map != "identity":
            signs[span.start] = "▣"
    halves: dict[int, set[str]] = {}
    for half in plan.halves:
        halves.setdefault(half.block, set()).add(half.half)
    legend = dict(_LEGEND)
    for block, replaced in halves.items():
        sign = "B" if len(replaced) == 2 else "A" if "attention" in replaced else "M"
        if signs[block] == "◧":
            sign = sign.lower()
            legend[sign] = f"{legend[sign.upper()]}, and its MLP also does the work of the removed blocks after it"
        signs[block] = sign
    lines = []
    for first in range(0, plan.depth, _A_ROW):
        row = range(first, min(first + _A_ROW, plan.depth))
        lines.append("block " + "".join(f"{block:3}" for block in row))
        lines.append("      " + "".join(f"{signs[block]:>3}" for block in row) + "\n")
    return "\n".join([*lines, *(f"{sign} {words}" for sign, words in legend.items() if sign in signs)])
