"""Plans measured side by side share work; each must cost what it costs alone."""

import random

import pytest
import torch

from hf_simprune.errors import InputError
from hf_simprune.rba.analysis import Analysis, analyze
from hf_simprune.rba.budget import make_plan
from hf_simprune.rba.cost import kl_logits, relative_squared_error
from hf_simprune.rba.maps import AffineMap
from hf_simprune.rba.measure import measure_plans
from hf_simprune.rba.plan import CompressionPlan, Half, Span
from hf_simprune.rba.replay import replay_output

from .conftest import DEPTH, make_model
from .image_sets import calibration, quiet_model


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    model = quiet_model(make_model("vit-classifier"), 0.5)
    kinds = ("fold", "linear", "identity")
    return analyze(
        model,
        calibration(12, 7),
        kinds=kinds,
        granularity="half",
        max_span=3,
        cost_images=2,
        chunk_size=4,
        progress=False,
    )


def random_plans(analysis: Analysis, count: int, seed: int) -> list[CompressionPlan]:
    """Valid plans of one to four items, many of which begin alike."""
    generator = random.Random(seed)
    items = sorted(analysis.maps, key=str)
    plans: set[CompressionPlan] = set()
    while len(plans) < count:
        try:
            plans.add(make_plan(DEPTH, generator.sample(items, generator.randint(1, 4))))
        except InputError:
            continue
    return sorted(plans, key=lambda plan: generator.random())


@torch.no_grad()
def alone(analysis: Analysis, plan: CompressionPlan, maps) -> tuple[float, float]:
    [chunk] = analysis.images.chunks(analysis.images.select, 100)
    before = analysis.adapter.model(chunk.pixel_values).logits
    after = replay_output(analysis.adapter, plan, maps, chunk.pixel_values)
    return kl_logits(before, after).mean().item(), relative_squared_error(before, after).mean().item()


@pytest.mark.parametrize("seed", range(3))
def test_plans_measured_together_cost_what_they_cost_alone(analysis, seed):
    plans = random_plans(analysis, 60, seed)
    results = measure_plans(analysis.bench, [(plan, analysis.maps) for plan in plans], analysis.images.select)
    for plan, result in zip(plans, results):
        cost, error = alone(analysis, plan, analysis.maps)
        assert result.cost == pytest.approx(cost, rel=1e-3, abs=1e-5), plan
        assert result.relative_error == pytest.approx(error, rel=1e-3, abs=1e-6), plan
        assert result.images == 7


def test_plans_that_differ_in_their_maps_only_share_nothing_they_should_not(analysis):
    plan = CompressionPlan(DEPTH, (Span(1, 2, "linear"), Span(4, 5, "linear")))
    first, second = (analysis.maps[span] for span in plan.spans)
    other = AffineMap(first.weight * 0.5, first.bias)
    runs = [(plan, analysis.maps), (plan, {**analysis.maps, plan.spans[0]: other}), (plan, analysis.maps)]
    results = measure_plans(analysis.bench, runs, analysis.images.select)
    assert results[0] == results[2] != results[1]
    assert results[1].cost == pytest.approx(alone(analysis, *runs[1])[0], rel=1e-3)


def test_work_is_shared_by_plans_that_begin_alike(analysis):
    runs_of_mlps = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_: runs_of_mlps.append(1))
        for layer in analysis.adapter.model.vit.layers
    ]
    spans = Span(1, 2), Span(3, 4)
    plans = [CompressionPlan(DEPTH, (*spans, Span(5, 6, kind))) for kind in ("linear", "identity")]
    measure_plans(analysis.bench, [(plan, analysis.maps) for plan in plans], analysis.images.select[:4])
    for hook in hooks:
        hook.remove()
    # the original once; both plans block 2, with its fold; then each block 4, for its output tokens only
    assert len(runs_of_mlps) == DEPTH + 1 + 2


def test_a_plan_that_replaces_nothing_costs_nothing(analysis):
    [result] = measure_plans(analysis.bench, [(CompressionPlan(DEPTH), {})], analysis.images.select)
    assert result.cost == pytest.approx(0, abs=1e-6)


def test_the_last_block_can_be_replaced_in_every_way(analysis):
    last = DEPTH - 1
    items = [Span(last, DEPTH, kind) for kind in ("fold", "linear", "identity")]
    items += [Half(last, half, kind) for half in ("attention", "mlp") for kind in ("linear", "const")]
    runs = [(make_plan(DEPTH, [item]), analysis.maps) for item in items]
    results = measure_plans(analysis.bench, runs, analysis.images.select)
    for (plan, maps), result in zip(runs, results):
        assert result.cost == pytest.approx(alone(analysis, plan, maps)[0], rel=1e-3, abs=1e-5), plan


def test_bars_are_silent_when_not_wanted(analysis, capsys):
    measure_plans(analysis.bench, [(CompressionPlan(DEPTH), {})], analysis.images.select)
    assert capsys.readouterr().err == ""
