"""The analysis against stock models changed by hand, for any number of processes, and what it refuses."""

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_simprune.errors import InputError
from hf_simprune.rba.adapters import adapter_for
from hf_simprune.rba.analysis import Analysis, analyze
from hf_simprune.rba.calibration import ImageReader, ImageSplit
from hf_simprune.rba.cost import kl_logits, kl_similarity, relative_squared_error
from hf_simprune.rba.maps import FittedMap
from hf_simprune.rba.moments import MomentAccumulator, Moments
from hf_simprune.rba.own_conversion import convert_to_own
from hf_simprune.rba.plan import CompressionPlan, Half, Span
from hf_simprune.rba.planner import Budget
from hf_simprune.rba.replay import activations
from hf_simprune.rba.report import RedundancyReport
from hf_simprune.rba.search import choose

from ..elsewhere import run_ranks
from .conftest import DEPTH, make_model
from .image_sets import PROCESSOR, calibration, pictures, quiet_model, summary


QUIET = {"progress": False, "chunk_size": 4, "max_span": 3}
OUTPUTS: dict[str, Callable[[PreTrainedModel, Tensor], Tensor]] = {
    "vit-classifier": lambda model, x: model(x).logits,
    "deit-teacher": lambda model, x: model(x).logits,
    "vit": lambda model, x: model(x).last_hidden_state[:, 0],
    "dinov2": lambda model, x: model(x).last_hidden_state[:, 0],
    "clip-projection": lambda model, x: model(x).image_embeds,
    "siglip-classifier": lambda model, x: model(x).logits,
}


def changed_by_hand(model: PreTrainedModel, item: Span | Half, fitted: FittedMap) -> PreTrainedModel:
    """A copy of the stock model whose modules give something else, by hooks; everything else runs as it does."""
    model = copy.deepcopy(model)
    adapter = adapter_for(model)
    if isinstance(item, Half):
        module = getattr(adapter.layers[item.block], item.half)
        attention = item.half == "attention"
        module.register_forward_hook(
            lambda _, args, kwargs, out: (
                (fitted((*args, *kwargs.values())[0]), None) if attention else fitted(args[0])
            ),
            with_kwargs=True,
        )
        return model
    for block in range(item.start, item.end):
        is_map = block == item.start and item.map != "fold"
        adapter.layers[block].register_forward_hook(
            lambda _, args, out, is_map=is_map: fitted(args[0]) if is_map else args[0]
        )
    if item.map == "fold":
        scale = adapter.mlp_scale(item.start - 1)
        gamma = torch.ones(adapter.width) if scale is None else scale.detach()
        adapter.mlp_output(item.start - 1).register_forward_hook(
            lambda _, args, out: (gamma * out @ fitted.weight + fitted.bias) / gamma
        )
    return model


def selection_pixels(analysis: Analysis, rows: tuple[int, ...]) -> Tensor:
    return torch.cat([chunk.pixel_values for chunk in analysis.images.chunks(rows)])


@torch.no_grad()
def reference_costs(analysis: Analysis, kind: str, item: Span | Half, images: int) -> tuple[float, float]:
    model, give = analysis.adapter.model, OUTPUTS[kind]
    pixel_values = selection_pixels(analysis, analysis.images.select[:images])
    before = give(model, pixel_values)
    after = give(changed_by_hand(model, item, analysis.maps[item]), pixel_values)
    if "classifier" in kind or "teacher" in kind:
        cost = kl_logits(before, after)
    else:
        cost = kl_similarity(before, after, give(model, selection_pixels(analysis, analysis.images.fit)))
    return cost.mean().item(), relative_squared_error(before, after).mean().item()


@pytest.mark.parametrize("kind", OUTPUTS)
def test_every_cost_is_that_of_the_stock_model_changed_by_hand(kind):
    model = quiet_model(make_model(kind))
    granularity = "half" if kind.startswith(("vit", "deit")) else "block"
    found = analyze(
        model, calibration(), kinds=("fold", "linear", "identity"), granularity=granularity, cost_images=5, **QUIET
    )
    assert set(found.costs) == set(found.maps) and {item.map for item in found.costs} >= {"fold", "linear", "identity"}
    for item, measured in found.costs.items():
        cost, error = reference_costs(found, kind, item, 5)
        assert measured.images == 5
        assert measured.cost == pytest.approx(cost, rel=1e-3, abs=1e-5), item
        assert measured.relative_error == pytest.approx(error, rel=1e-3, abs=1e-6), item
    assert max(measured.cost for measured in found.costs.values()) > 1e-3


def test_all_spans_up_to_the_longest_and_all_halves_are_measured_but_for_block_0():
    found = analyze(make_model("vit-classifier"), calibration(), granularity="half", **QUIET)
    spans = {(i, j) for i in range(1, DEPTH) for j in range(i + 1, min(i + 3, DEPTH) + 1)}
    expected = {Span(i, j, kind) for i, j in spans for kind in ("fold", "linear")}
    expected |= {
        Half(b, half, kind) for b in range(1, DEPTH) for half in ("attention", "mlp") for kind in ("linear", "const")
    }
    assert set(found.costs) == expected


def test_block_0_is_measured_when_asked_for():
    found = analyze(make_model("vit-classifier"), calibration(), first_block=True, **QUIET)
    assert Span(0, 1, "linear") in found.costs and not any(
        item.start == 0 and item.map == "fold" for item in found.costs
    )


def test_the_report_holds_metrics_of_all_spans_and_costs_of_those_measured(tmp_path: Path):
    found = analyze(make_model("vit-classifier"), calibration(), granularity="half", cost_images=3, **QUIET)
    report = found.report
    assert [(span.start, span.end) for span in report.spans] == [
        (i, j) for i in range(DEPTH) for j in range(i + 1, DEPTH + 1)
    ]
    for span in report.spans:
        assert all(math.isfinite(value) for value in (span.br_cls, span.br_all, span.cosine_all, span.cka, span.svcca))
        measured = span.start > 0 and span.end - span.start <= 3
        assert set(span.costs) == ({"fold", "linear"} if measured else set())
    one = next(span for span in report.spans if (span.start, span.end) == (2, 4))
    assert one.costs["fold"] == found.costs[Span(2, 4, "fold")].cost
    assert len(report.halves) == 2 * (DEPTH - 1)
    assert report.halves[0].costs["const"] == found.costs[Half(1, "attention", "const")].cost
    assert (report.images["fit"], report.images["selection"], report.images["cost"]) == (12, 7, 3)
    assert min(report.seconds.values()) >= 0 and report.plain_forward_seconds > 0
    report.save(tmp_path / "redundancy.json")
    assert RedundancyReport.load(tmp_path / "redundancy.json").to_dict() == report.to_dict()


def test_images_are_used_as_split_and_each_once():
    read = []

    class Watched(ImageReader):
        def pixels(self, index):
            read.append(index)
            return super().pixels(index)

    images = calibration(fit=11, select=6)
    images = dataclasses.replace(images, reader=Watched(pictures(17), PROCESSOR))
    found = analyze(make_model("vit-classifier"), images, cost_images=4, **QUIET)
    assert sorted(read[:11]) == list(range(11))
    assert set(read[11:]) == set(range(11, 15))
    assert found.moments.images == 11 and found.moments.count == 11 * 17


def test_the_moments_are_those_of_all_stored_activations():
    model = make_model("vit-classifier")
    found = analyze(model, calibration(), **QUIET)
    with torch.no_grad():
        pixel_values = selection_pixels(found, found.images.fit)
        hidden = model(pixel_values, output_hidden_states=True).hidden_states
    x, y = (hidden[i].flatten(0, 1).double() for i in (2, 4))
    expected = (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)
    assert torch.allclose(found.moments.cov("h2", "h4"), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    even = [row for row in found.images.fit if row % 2 == 0]
    x = hidden[3][even].flatten(0, 1).double()
    assert torch.allclose(found.moments.subset(0).mean("h3"), x.mean(0), rtol=1e-4, atol=1e-5)


def test_two_processes_find_what_one_finds(tmp_path: Path):
    """Real processes over gloo; neither 13 nor 17 images fill chunks of 4 or divide by 2 processes."""
    cases = {"vit-classifier": 13, "dinov2": 17}
    script = Path(__file__).parent / "analysis_on_ranks.py"
    ranks = run_ranks(2, [str(script), str(tmp_path), json.dumps(cases)], tmp_path)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    for kind, fit in cases.items():
        alone = analyze(quiet_model(make_model(kind)), calibration(fit, 7), cost_images=5, **QUIET)
        plan = choose(alone, Budget("blocks", 2), refine=False).plan
        for rank in range(2):
            shared = torch.load(tmp_path / f"{kind}{rank}.pt", weights_only=True)
            for name, value in summary(alone).items():
                assert (shared[name] - value).abs().max() <= 1e-10 * value.abs().max(), name
            assert CompressionPlan.load(tmp_path / f"{kind}{rank}.json") == plan


@pytest.mark.parametrize("world", [2, 3, 5])
def test_shares_of_any_number_of_processes_add_up_to_the_whole(world):
    adapter = adapter_for(make_model("vit-classifier"))
    images = calibration(fit=14)
    pilot = activations(adapter, next(images.chunks(images.fit, 4)).pixel_values, fold=True)

    def share(rank: int, processes: int) -> Moments | None:
        accumulator = MomentAccumulator(DEPTH, adapter.width, 3)
        accumulator.set_pilot(pilot)
        chunks = list(images.chunks(images.fit, 4, rank, processes))
        for chunk in chunks:
            parity = torch.tensor([index % 2 for index in chunk.indices])
            accumulator.update(activations(adapter, chunk.pixel_values, fold=True), parity)
        return accumulator.finish() if chunks else None

    alone = share(0, 1)
    shares = [moments for rank in range(world) if (moments := share(rank, world)) is not None]
    assert len(shares) == min(world, 4)
    whole = functools.reduce(Moments.merge, shares)
    assert whole.images == alone.images == 14
    for a, b in (("h0", "h3"), ("h2", "h6"), ("m1", "h3")):
        expected = alone.cov(a, b)
        assert (whole.cov(a, b) - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_a_model_with_nan_in_its_weights_is_refused_before_any_image_is_read():
    model = make_model("vit-classifier")
    model.vit.layers[3].mlp.fc1.weight.data[0, 0] = math.nan
    images = calibration()
    images.reader.pixels = None  # reading would fail
    with pytest.raises(InputError, match=r"vit\.layers\.3\.mlp\.fc1\.weight holds NaN"):
        analyze(model, images, **QUIET)


def test_fewer_tokens_than_features_are_refused_before_the_pass():
    images = calibration()
    images.split = ImageSplit((0,), (1, 2))
    with pytest.raises(InputError, match="1 images to fit on give 17 tokens, fewer than the 24 features"):
        analyze(make_model("vit-classifier"), images, **QUIET)


def test_constant_images_are_analysed():
    images = [np.full((32, 32, 3), 128, dtype=np.uint8)] * 19
    found = analyze(make_model("vit-classifier"), calibration(images=images), **QUIET)
    assert all(math.isfinite(measured.cost) for measured in found.costs.values())
    assert min(measured.cost for measured in found.costs.values()) < 1e-3  # one image is easily remembered


def test_constant_images_without_ridge_are_refused_with_the_reason():
    images = [np.full((32, 32, 3), 128, dtype=np.uint8)] * 19
    with pytest.raises(InputError, match="ridge"):
        analyze(make_model("vit-classifier"), calibration(images=images), ridge=0.0, **QUIET)


def test_unreadable_images_are_left_out_of_everything():
    images = pictures(19)
    for row in (2, 3, 14):
        images[row] = b"no image"
    found = analyze(make_model("vit-classifier"), calibration(images=images), **QUIET)
    assert found.moments.images == 10
    assert {measured.images for measured in found.costs.values()} == {6}
    assert found.report.images["unreadable"] == 3


def test_a_compressed_model_is_analysed_by_the_blocks_it_has():
    model = make_model("vit-classifier")
    first = analyze(model, calibration(), **QUIET)
    plan = CompressionPlan(DEPTH, (Span(2, 4, "linear"),))
    smaller = convert_to_own(model, plan, first.maps)
    found = analyze(smaller, calibration(), granularity="half", **QUIET)
    assert found.adapter.depth == DEPTH - 1
    assert Span(2, 3, "linear") not in found.costs  # the map that is there already
    assert Span(3, 4, "fold") not in found.costs  # block 2 has no MLP to fold into
    assert Span(3, 4, "linear") in found.costs and Span(2, 4, "linear") in found.costs
    assert not any(isinstance(item, Half) and item.block == 2 for item in found.costs)
    assert all(math.isfinite(measured.cost) for measured in found.costs.values())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kinds": ("folded",)}, "--map folded"),
        ({"kinds": ()}, "--map"),
        ({"granularity": "token"}, "--granularity token"),
        ({"max_span": 0}, "--max_span 0"),
        ({"kinds": ("low_rank",), "rank": 25}, "--rank 25"),
        ({"rank": 4}, "--rank 4"),
        ({"cost_images": 0}, "--cost_images 0"),
    ],
)
def test_bad_options_are_refused_by_name(options, named):
    with pytest.raises(InputError, match=named):
        analyze(make_model("vit-classifier"), calibration(), **{**QUIET, **options})


def test_half_precision_models_are_analysed():
    found = analyze(quiet_model(make_model("vit-classifier")).bfloat16(), calibration(), granularity="half", **QUIET)
    full = analyze(quiet_model(make_model("vit-classifier")), calibration(), granularity="half", **QUIET)
    by_cost = sorted(full.costs, key=lambda item: full.costs[item].cost)
    cheap, expensive = by_cost[0], by_cost[-1]
    assert found.costs[cheap].cost < found.costs[expensive].cost
    assert found.costs[expensive].cost == pytest.approx(full.costs[expensive].cost, rel=0.2)
