"""The picture of an analysis, by the pixels of the file."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hf_simprune.errors import InputError
from hf_simprune.pictures_rba import plot_redundancy, short
from hf_simprune.rba.plan import CompressionPlan, Half, Span
from hf_simprune.rba.report import HalfRecord, RedundancyReport, SpanRecord


FRAME = (213, 94, 0)
BRIGHT, DARK = (253, 231, 37), (68, 1, 84)  # the ends of the colour map


def report(depth=5, kinds=("fold",), cheapest=(2, 3), halves=()):
    spans = []
    for start in range(depth):
        for end in range(start + 1, depth + 1):
            value = 0.01 if (start, end) == cheapest else 1.0 + (end - start)
            spans.append(SpanRecord(start, end, -value, -value, costs=dict.fromkeys(kinds, value) if start else {}))
    return RedundancyReport("some/model", "vit", depth, 8, "KL, nats", tuple(spans), tuple(halves))


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def places(image, color, tolerance=4):
    return np.argwhere(np.abs(image - np.array(color)).max(axis=-1) <= tolerance)


def test_the_redundant_cell_is_bright_in_every_panel(tmp_path):
    plot_redundancy(report(), tmp_path / "r.png")
    image = pixels(tmp_path / "r.png")
    for panel in np.split(image[:, : image.shape[1] // 2 * 2], 2, axis=1):
        bright = places(panel[:, : int(0.8 * panel.shape[1])], BRIGHT)  # to the right lies the colour bar
        assert len(bright) > 300
        assert np.ptp(bright, axis=0).max() < 0.25 * panel.shape[0]  # one cell, in one place
        assert len(places(panel, DARK)) > 1000


def test_the_plan_is_framed_in_the_panel_of_its_map(tmp_path):
    both = report(kinds=("fold", "linear"))
    plot_redundancy(both, tmp_path / "none.png")
    assert len(places(pixels(tmp_path / "none.png"), FRAME)) == 0
    plot_redundancy(both, tmp_path / "linear.png", CompressionPlan(5, (Span(2, 3, "linear"),)))
    image = pixels(tmp_path / "linear.png")
    framed = places(image[: int(0.85 * image.shape[0])], FRAME)  # below lies the legend
    thirds = set((3 * framed[:, 1] // image.shape[1]).tolist())
    assert thirds == {0, 2}  # redundancy and linear, not fold


def test_half_blocks_get_a_panel(tmp_path):
    plot_redundancy(report(), tmp_path / "blocks.png")
    halves = [HalfRecord(b, half, {"linear": 0.5, "const": 0.7}) for b in range(1, 5) for half in ("attention", "mlp")]
    with_halves = report(halves=halves)
    plan = CompressionPlan(5, (), (Half(3, "mlp", "const"),))
    plot_redundancy(with_halves, tmp_path / "halves.png", plan)
    blocks, both = pixels(tmp_path / "blocks.png"), pixels(tmp_path / "halves.png")
    assert both.shape[0] > blocks.shape[0] + 100
    framed = places(both, FRAME)
    assert framed[:, 0].min() > 0.6 * both.shape[0]


def test_a_deep_network_has_no_numbers_and_still_fits(tmp_path):
    plot_redundancy(report(depth=24), tmp_path / "deep.png")
    height, width, _ = pixels(tmp_path / "deep.png").shape
    assert width < 2400 and height < 1500


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_odd_values_are_drawn(tmp_path, value):
    odd = report()
    spans = (replace(odd.spans[0], br_cls=value, br_all=value), *odd.spans[1:5])
    plot_redundancy(replace(odd, spans=spans), tmp_path / "odd.png")
    assert (tmp_path / "odd.png").stat().st_size > 1000


def test_nothing_measured_is_drawn_without_costs(tmp_path):
    plot_redundancy(report(kinds=()), tmp_path / "bare.png")
    plot_redundancy(report(), tmp_path / "costs.png")
    assert pixels(tmp_path / "bare.png").shape[1] < pixels(tmp_path / "costs.png").shape[1]


def test_what_cannot_be_drawn_is_said(tmp_path):
    with pytest.raises(InputError, match="holds no span"):
        plot_redundancy(replace(report(), spans=()), tmp_path / "r.png")
    with pytest.raises(InputError, match="the plan is for 6 blocks, the report for 5"):
        plot_redundancy(report(), tmp_path / "r.png", CompressionPlan(6, (Span(2, 3),)))
    assert not (tmp_path / "r.png").exists()


def test_numbers_in_cells_are_short():
    assert [short(value) for value in (12.34, 9.97, 1.26, 0.999, 0.123, 0.0123)] == [
        "12", "10", "1.3", "1.0", ".12", ".012",
    ]  # fmt: skip
