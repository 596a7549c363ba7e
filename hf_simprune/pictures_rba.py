# SPDX-License-Identifier: Apache-2.0
"""The picture of an analysis: block redundancy and measured cost of every span, and what a plan removes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .errors import InputError
from .pictures import COLORS
from .rba.plan import CompressionPlan
from .rba.report import RedundancyReport, SpanRecord


_COLORMAP = "viridis_r"  # bright: redundant
_FRAME = COLORS[0]
_NUMBERED_DEPTH = 16  # deeper networks have no room for numbers in the cells
_LEAST = 1e-6  # a change or cost of zero has no logarithm


def plot_redundancy(report: RedundancyReport, png: str | Path, plan: CompressionPlan | None = None) -> None:
    """Draw heat-maps over first and last removed block: block redundancy, and measured cost, one for each kind of map.

    A cell on the diagonal is a single block. Bright cells are redundant, in all panels; colours are logarithmic. Costs
    of half blocks get a panel of their own when there are any. What `plan` removes is framed in the panel of its map.

    Args:
        report: What was measured.
        png: File to write.
        plan: The plan that was chosen.

    Raises:
        InputError: the report holds no span, or the plan is for another depth.
    """
    if not report.spans:
        raise InputError(f"{png}: the report holds no span, so there is nothing to draw")
    if plan is not None and plan.depth != report.depth:
        raise InputError(f"{png}: the plan is for {plan.depth} blocks, the report for {report.depth}")
    kinds = report.map_kinds()
    side = min(7.0, max(4.2, 0.46 * report.depth))
    heights = [0.85 * side + 0.5] + ([2.4] if report.halves else [])
    figure = Figure(figsize=((1 + len(kinds)) * side, sum(heights) + 0.5), dpi=120, layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = list(parts[0].subplots(1, 1 + len(kinds), squeeze=False)[0])

    tokens = "CLS token" if any(np.isfinite(span.br_cls) for span in report.spans) else "all tokens"
    redundancy = span_matrix(report, lambda span: -span.br_cls if tokens == "CLS token" else -span.br_all)
    _heat_map(
        axes[0], redundancy, log_norm([redundancy]), f"Block redundancy\nmean squared change of the {tokens} (-BR)"
    )
    costs = {kind: span_matrix(report, partial(_cost, kind)) for kind in kinds}
    shared = log_norm(list(costs.values()))
    for axis, (kind, matrix) in zip(axes[1:], costs.items()):
        _heat_map(axis, matrix, shared, f"Measured cost, {kind} map\n{report.cost_name}")
    if report.halves:
        _halves(parts[1].subplots(), report, plan)
    if plan is not None:
        _frame_spans(axes, kinds, plan)
        figure.legend(
            handles=[Patch(facecolor="none", edgecolor=_FRAME, linewidth=2.5, label="removed by the plan")],
            loc="outside lower center",
            frameon=False,
        )
    figure.suptitle(f"{Path(report.model).name}: {report.depth} blocks; bright: redundant", fontsize=12)
    figure.savefig(png)


def _cost(kind: str, span: SpanRecord) -> float:
    return span.costs.get(kind, np.nan)


def span_matrix(report: RedundancyReport, value: Callable[[SpanRecord], float]) -> np.ndarray:
    """(L, L) by first and last removed block; NaN where there is no value."""
    matrix = np.full((report.depth, report.depth), np.nan)
    for span in report.spans:
        matrix[span.start, span.end - 1] = value(span)
    return matrix


def log_norm(matrices: list[np.ndarray]) -> LogNorm:
    """A logarithmic scale over all finite values; it leaves out the dearest twentieth, whose cells saturate."""
    found = [matrix[np.isfinite(matrix)] for matrix in matrices]
    values = np.maximum(np.concatenate(found), _LEAST) if found else np.array([1.0])
    if not values.size:
        values = np.array([1.0])
    low, high = values.min(), np.quantile(values, 0.95)
    return LogNorm(low, max(high, 1.01 * low), clip=True)


def _heat_map(axis: Axes, matrix: np.ndarray, norm: LogNorm, title: str) -> None:
    shown = np.maximum(matrix, _LEAST)
    image = axis.imshow(shown, cmap=_COLORMAP, norm=norm)
    _color_bar(axis, image)
    axis.set_title(title, fontsize=10)
    axis.set(xlabel="last block removed", ylabel="first block removed")
    for ticks in (axis.xaxis, axis.yaxis):
        _count_blocks(ticks, len(matrix))
    axis.spines[:].set_visible(False)
    if len(matrix) <= _NUMBERED_DEPTH:
        _write_numbers(axis, matrix, norm)


def _color_bar(axis: Axes, image: AxesImage) -> None:
    bar = axis.figure.colorbar(image, ax=axis, extend="max", pad=0.02)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    bar.ax.yaxis.set_major_formatter(plain)
    bar.ax.yaxis.set_minor_formatter(plain)
    bar.ax.tick_params(which="both", labelsize=7)


def _count_blocks(axis: XAxis | YAxis, depth: int) -> None:
    axis.set_major_locator(MaxNLocator(integer=True, nbins=depth if depth <= _NUMBERED_DEPTH else 13))


def _write_numbers(axis: Axes, matrix: np.ndarray, norm: LogNorm, size: float = 8) -> None:
    for row, column in zip(*np.nonzero(np.isfinite(matrix))):
        value = matrix[row, column]
        color = "white" if norm(max(value, _LEAST)) > 0.55 else "black"
        axis.text(column, row, short(value), ha="center", va="center", fontsize=size, color=color)


def short(value: float) -> str:
    """Two digits that count, where four characters can hold them."""
    if abs(value) >= 9.95:
        return f"{value:.0f}"
    if abs(value) >= 0.995:
        return f"{value:.1f}"
    return f"{value:.{2 if abs(value) >= 0.0995 else 3}f}".replace("0.", ".", 1)


def _halves(axis: Axes, report: RedundancyReport, plan: CompressionPlan | None) -> None:
    rows = list(dict.fromkeys((half.half, kind) for half in report.halves for kind in half.costs))
    rows.sort()
    matrix = np.full((len(rows), report.depth), np.nan)
    for half in report.halves:
        for kind, cost in half.costs.items():
            matrix[rows.index((half.half, kind)), half.block] = cost
    norm = log_norm([matrix])
    image = axis.imshow(np.maximum(matrix, _LEAST), cmap=_COLORMAP, norm=norm, aspect="auto")
    _color_bar(axis, image)
    axis.set_title(f"Half blocks: measured cost, {report.cost_name}", fontsize=10)
    axis.set_xlabel("block")
    axis.set_yticks(range(len(rows)), [f"{half} → {kind}" for half, kind in rows])
    _count_blocks(axis.xaxis, report.depth)
    axis.spines[:].set_visible(False)
    _write_numbers(axis, matrix, norm, size=8 if report.depth <= 24 else 5)
    for removed in plan.halves if plan is not None else ():
        if (removed.half, removed.map) in rows:
            _frame(axis, rows.index((removed.half, removed.map)), removed.block)


def _frame_spans(axes: list[Axes], kinds: tuple[str, ...], plan: CompressionPlan) -> None:
    for span in plan.spans:
        _frame(axes[0], span.start, span.end - 1)
        if span.map in kinds:
            _frame(axes[1 + kinds.index(span.map)], span.start, span.end - 1)


def _frame(axis: Axes, row: int, column: int) -> None:
    axis.add_patch(
        Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=_FRAME, linewidth=2.5, clip_on=False)
    )
