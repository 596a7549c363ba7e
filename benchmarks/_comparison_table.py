# SPDX-License-Identifier: Apache-2.0
"""The table of a comparison: numbers, the gate, and what they look like as Markdown and as a picture."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from _intervals import Estimate, bootstrap, difference_interval
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hf_simprune.pictures import COLORS


GATE_RANDOM, GATE_PIXELS = 0.10, 0.03
DENSE, RANDOM_NETWORK, PIXELS = "none", "random network", "raw pixels"


@dataclass(frozen=True)
class Row:
    """A method over its seeds, or a baseline.

    hits: (seeds, images) booleans by measure. seeds: which. flop_share, time_share: of the dense step's FLOPs and
    seconds (None where unknown). peak_bytes: the highest of the runs.
    """

    label: str
    seeds: Sequence[int]
    hits: Mapping[str, np.ndarray]
    flop_share: float | None = None
    time_share: float | None = None
    peak_bytes: float | None = None
    runs: Sequence[Mapping[str, object]] = field(default_factory=list)


def accuracy(hits: np.ndarray) -> tuple[float, float | None]:
    """Mean and standard deviation over seeds (None for one seed) of hits (seeds, images), in percent."""
    by_seed = [100 * float(value) for value in hits.mean(axis=1)]
    return statistics.mean(by_seed), statistics.stdev(by_seed) if len(by_seed) > 1 else None


def gate(dense: np.ndarray, random: np.ndarray, pixels: np.ndarray) -> tuple[bool, str]:
    """Whether the dense runs learned enough for a loss to mean anything, with the verdict in words."""
    above_random, above_pixels = (float(dense.mean() - other.mean()) for other in (random, pixels))
    slack = 1e-9  # 0.5 - 0.4 is less than 0.1
    passed = above_random >= GATE_RANDOM - slack and above_pixels >= GATE_PIXELS - slack
    verdict = "passed" if passed else "NOT passed: DINO did not learn enough, so nothing follows about pruning"
    return passed, (
        f"gate: dense is {100 * above_random:+.2f} points over the random network ({100 * GATE_RANDOM:.0f} asked) and "
        f"{100 * above_pixels:+.2f} over raw pixels ({100 * GATE_PIXELS:.0f}): {verdict}"
    )


def retained_gain(x: np.ndarray, random: np.ndarray, dense: np.ndarray, seed: int = 0) -> Estimate:
    """(x - random) / (dense - random) of mean accuracies, with a 95 % bootstrap interval over images (columns)."""
    x, random, dense = (values.mean(axis=0) for values in (x, random, dense))

    def gain(weights: np.ndarray) -> np.ndarray:
        return (weights @ x - weights @ random) / (weights @ dense - weights @ random)

    value = (x.mean() - random.mean()) / (dense.mean() - random.mean())
    return Estimate(float(value), *bootstrap(gain, len(x), seed))


def common_seeds(row: Row, dense: Row, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """Hits of both on the seeds that both have."""
    shared = [seed for seed in row.seeds if seed in dense.seeds]
    return tuple(other.hits[measure][[list(other.seeds).index(seed) for seed in shared]] for other in (row, dense))


def compare(rows: Sequence[Row], measure: str) -> dict[str, object]:
    """The gate's verdict, and of every method its difference to dense and, past the gate, its retained gain.

    Only seeds count that the method and the dense runs share; differences are in points.
    """
    by_label = {row.label: row for row in rows}
    dense, random, pixels = by_label[DENSE], by_label[RANDOM_NETWORK], by_label[PIXELS]
    passed, verdict = gate(dense.hits[measure], random.hits[measure], pixels.hits[measure])
    found: dict[str, object] = {"passed": passed, "gate": verdict, "difference": {}, "gain": {}}
    for row in rows:
        if row.label in (DENSE, RANDOM_NETWORK, PIXELS):
            continue
        mine, theirs = common_seeds(row, dense, measure)
        if not len(mine):
            continue
        found["difference"][row.label] = difference_interval(100 * mine.mean(axis=0), 100 * theirs.mean(axis=0))
        if passed:
            untrained = common_seeds(row, random, measure)[1]
            found["gain"][row.label] = retained_gain(mine, untrained, theirs)
    return found


def markdown(
    rows: Sequence[Row], comparisons: Mapping[str, Mapping], measures: Mapping[str, str], notes: Sequence[str]
) -> str:
    """The whole report. notes: lines before the table."""
    titles = ["method", "seeds", *(f"{title} (%)" for title in measures.values()), "FLOPs", "time", "peak memory"]
    lines = ["# Comparison of token reductions", "", *(f"- {note}" for note in notes), ""]
    lines += [_line(titles), _line(["---"] * len(titles))]
    for row in rows:
        cells = [name_of(row), " ".join(map(str, row.seeds)) or "–"]
        cells += [spread_text(*accuracy(row.hits[measure])) for measure in measures]
        shares = [f"{100 * share:.1f} %" if share is not None else "–" for share in (row.flop_share, row.time_share)]
        cells += [*shares, f"{row.peak_bytes / 2**20:.0f} MiB" if row.peak_bytes else "–"]
        lines.append(_line(cells))
    for measure, title in measures.items():
        found = comparisons[measure]
        lines += ["", f"## {title}", "", f"{found['gate']}.", ""]
        if not found["difference"]:
            continue
        gained = found["passed"]
        heads = ["method", "difference to dense (points)", *(["retained gain"] if gained else [])]
        lines += [_line(heads), _line(["---"] * len(heads))]
        for label, difference in found["difference"].items():
            gain = [found["gain"][label].text()] if gained else []
            lines.append(_line([label, difference.text(2, "+"), *gain]))
    return "\n".join(lines) + "\n"


def name_of(row: Row) -> str:
    """As tables and pictures show it."""
    return "dense" if row.label == DENSE else row.label


def spread_text(mean: float, deviation: float | None) -> str:
    """`36.50 ± 0.41`, or the mean alone."""
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def draw(rows: Sequence[Row], measures: Mapping[str, str], png: Path, title: str) -> None:
    """Accuracy of every method by measure, a dot a seed and a bar at the mean, beside its FLOP and time share."""
    baselines = {row.label: row for row in rows if row.label in (RANDOM_NETWORK, PIXELS)}
    methods = [row for row in rows if row.label not in baselines]
    places = np.arange(len(methods))
    height = 1.9 + 0.42 * len(methods)
    figure = Figure(figsize=(4.2 + 2.9 * len(measures), height), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(measures) + 1, sharey=True, squeeze=False)[0]
    for axis, color, (measure, name) in zip(axes, COLORS[1:], measures.items()):
        for place, row in zip(places, methods):
            by_seed = 100 * row.hits[measure].mean(axis=1)
            axis.plot(by_seed, np.full(len(by_seed), place), "o", color=color, alpha=0.6, markersize=6)
            axis.plot([by_seed.mean()] * 2, [place - 0.28, place + 0.28], color=color, linewidth=2.5)
        for style, (label, row) in zip((":", "--"), baselines.items()):
            axis.axvline(100 * row.hits[measure].mean(), color="0.4", linestyle=style, label=label)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("accuracy, %")
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
    axes[0].set_yticks(places, [name_of(row) for row in methods])
    axes[0].invert_yaxis()
    last = axes[-1]
    for offset, color, name in ((-0.17, COLORS[0], "FLOPs"), (0.17, COLORS[5], "time")):
        shares = [row.flop_share if name == "FLOPs" else row.time_share for row in methods]
        known = [(place, share) for place, share in zip(places, shares) if share is not None]
        if known:
            last.barh([place + offset for place, _ in known], [s for _, s in known], 0.32, color=color, label=name)
    last.axvline(1, color="0.4", linewidth=0.8)
    last.xaxis.set_major_formatter(PercentFormatter(1))
    last.set_title("cost of a step, dense = 100 %", fontsize=10)
    last.set_xlim(left=0)
    handles, labels = axes[0].get_legend_handles_labels()
    more = last.get_legend_handles_labels()
    figure.legend(handles + more[0], labels + more[1], loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(png)
