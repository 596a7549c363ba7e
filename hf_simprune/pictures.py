# SPDX-License-Identifier: Apache-2.0
"""Pictures of a training run: the loss curve, and which patches were pruned or merged in the views of an image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from .errors import InputError


# Okabe and Ito's palette: told apart by colour-blind readers and in print.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
_KNN_PREFIX = "knn_accuracy"
_OUTLINE = "#222222"


def plot_loss_curve(
    records: Sequence[Mapping[str, Any]], png: str | Path, baselines: Mapping[str, float] | None = None
) -> None:
    """Draw loss and teacher entropy, their difference KL, and the k-NN accuracy over the steps of a run.

    Args:
        records: the objects of `metrics.jsonl`. Drawn are `loss`, `teacher_entropy` and `kl` (nats), and every number
            whose name begins with `knn_accuracy` (a fraction), against `step`. What no record holds is left out.
        png: file to write.
        baselines: accuracies (fractions) drawn as horizontal lines, by name, such as `{"raw pixels": 0.39}`.

    Raises:
        InputError: if no record holds a loss.
    """
    if not any("loss" in record for record in records):
        raise InputError(f"{png}: no logged step holds a loss, so there is no curve to draw")
    accuracies = sorted({name for record in records for name in record if name.startswith(_KNN_PREFIX)})
    has_kl = any("kl" in record for record in records)
    panels = 1 + has_kl + bool(accuracies)
    figure = Figure(figsize=(8, 1.0 + 2.3 * panels), dpi=120, layout="constrained")
    axes: list[Axes] = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])

    _line(axes[0], records, "loss", "loss", COLORS[1])
    _line(axes[0], records, "teacher_entropy", "teacher entropy H", COLORS[4])
    axes[0].set(title="DINO loss", ylabel="nats")
    axes[0].legend(frameon=False)
    if has_kl:
        _line(axes[1], records, "kl", "KL", COLORS[2])
        axes[1].set(title="KL(teacher, student) = loss − H", ylabel="nats")
        highest = max(record["kl"] for record in records if "kl" in record)
        axes[1].set_ylim(bottom=min(0.0, axes[1].get_ylim()[0]), top=max(1.1 * highest, 1e-3))
    if accuracies:
        for color, name in zip(COLORS, accuracies):
            label = name.removeprefix(_KNN_PREFIX).strip("_").replace("_", " ") or "CLS"
            _line(axes[-1], records, name, label, color, marker="o", scale=100)
        for style, (name, value) in zip((":", "--", "-."), (baselines or {}).items()):
            axes[-1].axhline(100 * value, color="0.35", linestyle=style, label=name)
        axes[-1].set(title="k-NN accuracy", ylabel="%")
        axes[-1].legend(frameon=False)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(png)


@dataclass(frozen=True)
class PrunedView:
    """One view of an image and what became of its patches, at several moments of training or after several stages.

    Attributes:
        title: such as "student, view A".
        image: (H, W, 3) floats in 0..1, as the network saw it but without the normalisation.
        stage_dropped: one (h, w) integer array a moment, for the h x w patches: 0 where the patch was kept to the
            end, s where the s-th reduction stage dropped it.
        tokens: one (h, w) integer array a moment, the token that each patch is in, where methods merge them: patches
            of one number are one token. Dropped patches count for nothing, whatever their number.
    """

    title: str
    image: np.ndarray
    stage_dropped: Sequence[np.ndarray]
    tokens: Sequence[np.ndarray] | None = None


def plot_pruned_tokens(
    views: Sequence[PrunedView],
    moments: Sequence[str],
    stages: Sequence[str],
    png: str | Path,
    title: str | None = None,
) -> None:
    """Draw each view as a row: first the view itself, then one panel a moment with what became of its patches.

    A kept patch shows the image; a dropped one is faded, tinted and framed in the colour of the stage that dropped it.
    Merged patches have their mean colour, and an outline around each token's region.

    Args:
        views: the rows.
        moments: names of the columns, such as "start", "middle", "end of the curriculum", or of stages.
        stages: names of the reduction stages in order, such as "block 3".
        png: file to write.

    Raises:
        InputError: if a view does not hold one grid for each moment, or a grid holds a stage without a name.
    """
    _check_views(views, moments, stages, png)
    columns = 1 + len(moments)
    heights = [view.image.shape[0] / view.image.shape[1] for view in views]
    figure = Figure(figsize=(2.3 * columns, 2.35 * sum(heights) + 1.4), dpi=120, layout="constrained")
    axes = figure.subplots(len(views), columns, squeeze=False, height_ratios=heights)
    colors = [COLORS[i % len(COLORS)] for i in range(len(stages))]
    for row, view in zip(axes, views):
        row[0].imshow(np.clip(view.image, 0, 1), interpolation="nearest")
        row[0].set_ylabel(view.title, fontsize=11)
        for axis, grid, merged in zip(row[1:], view.stage_dropped, _merged(view)):
            axis.imshow(tinted(_mean_colours(view.image, merged), grid, colors), interpolation="nearest")
            _frame_patches(axis, view.image, grid, colors)
            _outline_tokens(axis, view.image, merged)
            kept = int((grid == 0).sum())
            left = f"{kept} of {grid.size} patches kept"
            if merged.any():
                groups = len(np.unique(merged[merged > 0])) + ((merged == 0) & (grid == 0)).sum()
                left = f"{kept} patches in {groups} group{'s' if groups > 1 else ''}"
            axis.set_xlabel(left, fontsize=8)
    for axis, name in zip(axes[0], ["the view", *moments]):
        axis.set_title(name, fontsize=11)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    handles = [Patch(facecolor="white", edgecolor="0.4", label="kept: shown as it is")]
    merges = any(merged.any() for view in views for merged in _merged(view))
    if merges:
        handles.append(Patch(facecolor="0.8", edgecolor=_OUTLINE, label="merged: mean colour of the outlined group"))
    if not merges or any(grid.any() for view in views for grid in view.stage_dropped):
        handles += [
            Patch(facecolor=to_rgb(tuple(_veil(np.array(to_rgb(color))))), edgecolor=color, label=f"dropped at {name}")
            for color, name in zip(colors, stages)
        ]
    _add_legend(figure, handles)
    if title:
        figure.suptitle(title, fontsize=12)
    figure.savefig(png)


def _add_legend(figure: Figure, handles: Sequence[Patch]) -> None:
    """Below the panels, in as many columns as the figure is wide enough for, at most 4."""
    for columns in range(min(4, len(handles)), 0, -1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _line(
    axis: Axes,
    records: Sequence[Mapping[str, Any]],
    name: str,
    label: str,
    color: str,
    marker: str | None = None,
    scale: float = 1.0,
) -> None:
    points = [(record["step"], scale * record[name]) for record in records if name in record]
    if points:
        # A single point is invisible as a line.
        axis.plot(*zip(*points), color=color, label=label, marker=marker or ("o" if len(points) == 1 else None))


def _edges(length: int, parts: int) -> np.ndarray:
    """Pixel positions of the borders between `parts` equal patches."""
    return np.linspace(0, length, parts + 1)


def _merged(view: PrunedView) -> list[np.ndarray]:
    """For every panel (h, w): the number of each patch's token, from 1; 0 where it is alone in it, or dropped."""
    if view.tokens is None:
        return [np.zeros_like(grid) for grid in view.stage_dropped]
    found = []
    for grid, tokens in zip(view.stage_dropped, view.tokens):
        names, places, sizes = np.unique(tokens.ravel(), return_inverse=True, return_counts=True)
        alone = (sizes[places] < 2) | (grid.ravel() > 0)
        found.append(np.where(alone, 0, places + 1).reshape(grid.shape))
    return found


def _mean_colours(image: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """(H, W, 3): the image with every merged token's patches in their mean colour."""
    numbers = merged[_patch_of_pixels(image, merged)]
    shown = np.clip(image, 0, 1)
    for number in np.unique(merged[merged > 0]):
        shown[numbers == number] = shown[numbers == number].mean(axis=0)
    return shown


def _outline_tokens(axis: Axes, image: np.ndarray, merged: np.ndarray) -> None:
    """Lines between neighbouring patches of different tokens, at least one of them merged, and around the image."""
    ys, xs = _edges(image.shape[0], merged.shape[0]) - 0.5, _edges(image.shape[1], merged.shape[1]) - 0.5
    padded = np.pad(merged, 1)
    lines = []
    for row, col in zip(*np.nonzero(padded[:-1, 1:-1] != padded[1:, 1:-1])):
        lines.append([(xs[col], ys[row]), (xs[col + 1], ys[row])])
    for row, col in zip(*np.nonzero(padded[1:-1, :-1] != padded[1:-1, 1:])):
        lines.append([(xs[col], ys[row]), (xs[col], ys[row + 1])])
    axis.add_collection(LineCollection(lines, colors=_OUTLINE, linewidths=1.2))


def _patch_of_pixels(image: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices that spread a (h, w) grid over the (H, W) pixels of an image."""
    height, width = image.shape[:2]
    rows = np.minimum((np.arange(height) + 0.5) * grid.shape[0] / height, grid.shape[0] - 1e-9).astype(int)
    cols = np.minimum((np.arange(width) + 0.5) * grid.shape[1] / width, grid.shape[1] - 1e-9).astype(int)
    return np.ix_(rows, cols)


def tinted(image: np.ndarray, grid: np.ndarray, colors: Sequence[str]) -> np.ndarray:
    """(H, W, 3): the image with each dropped patch blended towards white and its stage's colour."""
    stage = grid[_patch_of_pixels(image, grid)]
    palette = np.array([(1.0, 1.0, 1.0), *map(to_rgb, colors)])[stage]
    shown = np.clip(image, 0, 1)
    return np.where((stage > 0)[..., None], 0.15 * shown + 0.85 * _veil(palette), shown)


def _veil(color: np.ndarray) -> np.ndarray:
    """A light tint of a colour (..., 3)."""
    return 0.45 * color + 0.55


def _frame_patches(axis: Axes, image: np.ndarray, grid: np.ndarray, colors: Sequence[str]) -> None:
    ys, xs = _edges(image.shape[0], grid.shape[0]) - 0.5, _edges(image.shape[1], grid.shape[1]) - 0.5
    for row, col in zip(*np.nonzero(grid)):
        size = xs[col + 1] - xs[col], ys[row + 1] - ys[row]
        color = colors[grid[row, col] - 1]
        axis.add_patch(Rectangle((xs[col], ys[row]), *size, fill=False, edgecolor=color, linewidth=1.0))


def _check_views(views: Sequence[PrunedView], moments: Sequence[str], stages: Sequence[str], png: str | Path) -> None:
    if not views:
        raise InputError(f"{png}: there is no view to draw")
    for view in views:
        if view.tokens is not None and len(view.tokens) != len(view.stage_dropped):
            raise InputError(
                f"{png}: view {view.title!r} has {len(view.tokens)} arrays of tokens for "
                f"{len(view.stage_dropped)} grids"
            )
        if len(view.stage_dropped) != len(moments):
            raise InputError(
                f"{png}: view {view.title!r} has {len(view.stage_dropped)} grids, but there are {len(moments)} moments"
            )
        for grid in view.stage_dropped:
            if grid.min() < 0 or grid.max() > len(stages):
                raise InputError(
                    f"{png}: view {view.title!r} has stages {grid.min()} to {grid.max()}; 0 to {len(stages)} exist"
                )
