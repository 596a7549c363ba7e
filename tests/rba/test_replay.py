"""The forward pass in pieces, and the forward pass that a plan would make, against loops over the stock model."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_simprune import InputError, models
from hf_simprune.rba.adapters import adapter_for, module_forward
from hf_simprune.rba.maps import AffineMap, ConstMap, FittedMaps, IdentityMap, LowRankMap
from hf_simprune.rba.plan import CompressionPlan, Half, Span
from hf_simprune.rba.replay import activations, check_plan, replay, replay_output

from .conftest import DEPTH, IMAGE_SIZE, WIDTH, make_model


def random_map(item: Span | Half, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    if item.map == "identity":
        return IdentityMap()
    if item.map == "const":
        return ConstMap(draw(WIDTH))
    if item.map == "low_rank":
        return LowRankMap(draw(WIDTH, item.rank), draw(item.rank, WIDTH), draw(WIDTH))
    return AffineMap(torch.eye(WIDTH) + draw(WIDTH, WIDTH), draw(WIDTH))


def random_maps(plan: CompressionPlan) -> FittedMaps:
    return {item: random_map(item, seed) for seed, item in enumerate((*plan.spans, *plan.halves))}


PLANS = {
    "nothing": CompressionPlan(DEPTH),
    "fold": CompressionPlan(DEPTH, (Span(2, 4),)),
    "fold at the end": CompressionPlan(DEPTH, (Span(4, 6),)),
    "linear at the end": CompressionPlan(DEPTH, (Span(5, 6, "linear"),)),
    "linear at the start": CompressionPlan(DEPTH, (Span(0, 2, "linear"),)),
    "all kinds": CompressionPlan(DEPTH, (Span(1, 2), Span(3, 4, "low_rank", 3), Span(5, 6, "identity"))),
    "halves": CompressionPlan(
        DEPTH,
        (Span(2, 3),),
        (
            Half(0, "attention", "const"),
            Half(1, "attention", "linear"),
            Half(3, "mlp", "linear"),
            Half(4, "mlp", "const"),
            Half(5, "attention", "linear"),
            Half(5, "mlp", "linear"),
        ),
    ),
    "no attention left": CompressionPlan(
        DEPTH, (Span(1, 5, "linear"),), (Half(0, "attention", "linear"), Half(5, "attention", "const"))
    ),
}


# Norm and what comes behind it, of attention and MLP: in ViT and DeiT, and in DINOv2.
PARTS = (
    (("layernorm_before", "dropout"), ("layernorm_after", "dropout")),
    (("norm1", "layer_scale1"), ("norm2", "layer_scale2")),
)


@pytest.fixture(params=PLANS.values(), ids=list(PLANS))
def plan(request: pytest.FixtureRequest) -> CompressionPlan:
    return request.param


@torch.no_grad()
def naive_positions(model: PreTrainedModel, plan: CompressionPlan, maps: FittedMaps, images: Tensor) -> dict:
    """All tokens at every position the plan keeps, block by block; ViT, DeiT and DINOv2 classifiers only."""
    adapter = adapter_for(model)
    h = adapter.embed(images)[0]
    spans = {span.start: span for span in plan.spans}
    halves = {(half.block, half.half): maps[half] for half in plan.halves}
    positions = {0: h}
    b = 0
    while b < plan.depth:
        if b in spans:
            h = maps[spans[b]](h)
            b = spans[b].end
        else:
            layer = adapter.layers[b]
            first, second = PARTS[hasattr(layer, "norm1")]
            normed = getattr(layer, first[0])(h)
            found = halves[b, "attention"](normed) if (b, "attention") in halves else None
            y = h + (getattr(layer, first[1])(layer.attention(normed)[0]) if found is None else found)
            normed = getattr(layer, second[0])(y)
            found = halves[b, "mlp"](normed) if (b, "mlp") in halves else None
            write = getattr(layer, second[1])(layer.mlp(normed)) if found is None else found
            b += 1
            if b in spans and spans[b].map == "fold":
                write = maps[spans[b]](write)
                b = spans[b].end
            h = y + write
        positions[b] = h
    return positions


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["vit-classifier", "deit-classifier", "deit-teacher", "vit-own-classifier", "dinov2-classifier"]
)
def test_a_replayed_plan_is_the_model_with_the_maps_put_in(kind, plan, images):
    model = make_model(kind)
    adapter, maps = adapter_for(model), random_maps(plan)
    expected = adapter.output(naive_positions(model, plan, maps, images)[DEPTH])
    torch.testing.assert_close(replay_output(adapter, plan, maps, images), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit-classifier", "deit-teacher"])
def test_replay_goes_on_from_any_position_the_plan_keeps(kind, plan, images):
    model = make_model(kind)
    adapter, maps = adapter_for(model), random_maps(plan)
    context = adapter.embed(images)[1]
    positions = naive_positions(model, plan, maps, images)
    expected = adapter.output(positions[DEPTH])
    assert len(positions) == 1 + DEPTH - len(plan.removed_blocks) + sum(span.map != "fold" for span in plan.spans)
    for start, h in positions.items():
        h = replay(adapter, plan, maps, h, context, start=start)
        assert start == DEPTH or h.shape[1] == adapter.num_prefix_tokens
        torch.testing.assert_close(adapter.output(h), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_every_family_replays(kind, model, images):
    """A fold and a linear map in every family, against blocks run one by one through their halves."""
    adapter = adapter_for(model)
    plan = CompressionPlan(DEPTH, (Span(1, 3), Span(4, 5, "linear")), (Half(3, "attention", "linear"),))
    maps = random_maps(plan)
    h, context = adapter.embed(images)

    def opened(b: int, h: Tensor) -> tuple[Tensor, Tensor]:
        y = h + adapter.attention_write(b, adapter.attention_input(b, h), context)
        return y, adapter.mlp_write(b, adapter.mlp_input(b, y))

    y, write = opened(0, h)
    h = y + maps[plan.spans[0]](write)
    y = h + maps[plan.halves[0]](adapter.attention_input(3, h))
    h = y + adapter.mlp_write(3, adapter.mlp_input(3, y))
    h = adapter.block(5, maps[plan.spans[1]](h), context)
    torch.testing.assert_close(replay_output(adapter, plan, maps, images), adapter.output(h), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_plan_without_changes_gives_the_models_output(model, images):
    adapter = adapter_for(model)
    output = replay_output(adapter, CompressionPlan(DEPTH), {}, images)
    torch.testing.assert_close(output, module_forward(adapter, images), rtol=1e-5, atol=1e-5)


def test_the_last_attention_is_computed_for_the_tokens_of_the_output_only(images):
    """Whatever follows it: a plan that ends in maps costs no more than one that ends in a block."""
    adapter = adapter_for(make_model("vit-classifier"))
    seen = []
    for layer in adapter.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    tokens = 1 + (IMAGE_SIZE // 8) ** 2
    for plan in (
        CompressionPlan(DEPTH, (Span(4, 6, "linear"),)),
        CompressionPlan(DEPTH, (Span(4, 6, "fold"),)),
        CompressionPlan(DEPTH, (Span(2, 4),)),
    ):
        seen.clear()
        replay_output(adapter, plan, random_maps(plan), images)
        assert seen == [tokens] * 3 + [1]
    plan = CompressionPlan(DEPTH, (), tuple(Half(b, "attention", "linear") for b in (3, 4, 5)))
    seen.clear()
    replay_output(adapter, plan, random_maps(plan), images)
    assert seen == [tokens] * 2 + [1] * 4


def test_replay_from_a_removed_position_is_refused(images):
    adapter = adapter_for(make_model("vit-classifier"))
    plan = CompressionPlan(DEPTH, (Span(1, 3), Span(4, 6, "linear")))
    h, context = adapter.embed(images)
    for start in (1, 2, 5):
        with pytest.raises(ValueError, match=f"start {start}"):
            replay(adapter, plan, random_maps(plan), h, context, start=start)


def test_a_rank_above_the_width_is_refused(images):
    plan = CompressionPlan(DEPTH, (Span(2, 3, "low_rank", WIDTH + 1),))
    with pytest.raises(InputError, match=rf"low_rank of rank {WIDTH + 1} 2→3: 1 to {WIDTH} are accepted"):
        check_plan(adapter_for(make_model("vit")), plan)


def test_a_plan_for_another_depth_is_refused(images):
    plan = CompressionPlan(DEPTH + 1, (Span(1, 2),))
    with pytest.raises(InputError, match="depth"):
        replay_output(adapter_for(make_model("vit")), plan, random_maps(plan), images)


def compressed_model() -> PreTrainedModel:
    config = make_model("vit-own-classifier").config.to_dict()
    maps = {"1": {"kind": "linear"}, "3": {"kind": "block", "attention": "linear", "mlp": "const"}}
    torch.manual_seed(0)
    return models.SimPruneViTForImageClassification(
        models.SimPruneViTConfig.from_dict({**config, "block_maps": maps})
    ).eval()


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        (CompressionPlan(DEPTH, (Span(2, 3),)), "block 1"),
        (CompressionPlan(DEPTH, (Span(4, 5),)), "block 3"),
        (CompressionPlan(DEPTH, (), (Half(1, "mlp", "linear"),)), "block 1"),
        (CompressionPlan(DEPTH, (), (Half(3, "attention", "const"),)), "block 3"),
    ],
)
def test_what_is_replaced_already_cannot_be_replaced_again(plan, named, images):
    adapter = adapter_for(compressed_model())
    with pytest.raises(InputError, match=f"{named}.*already") as caught:
        replay_output(adapter, plan, random_maps(plan), images)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_a_compressed_model_replays(images):
    """Its maps stay, new spans may remove them."""
    model = compressed_model()
    adapter = adapter_for(model)
    torch.testing.assert_close(
        replay_output(adapter, CompressionPlan(DEPTH), {}, images), model(images).logits, rtol=1e-5, atol=1e-5
    )
    plan = CompressionPlan(DEPTH, (Span(1, 2, "identity"), Span(3, 5)))
    maps = random_maps(plan)
    h, context = adapter.embed(images)
    h = adapter.block(0, h, context)
    layer = adapter.layers[2]
    y = h + layer.attention(layer.layernorm_before(h))[0]
    h = adapter.block(5, y + maps[plan.spans[1]](layer.mlp(layer.layernorm_after(y))), context)
    torch.testing.assert_close(replay_output(adapter, plan, maps, images), adapter.output(h), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("halves", "fold"), [(False, False), (False, True), (True, False), (True, True)])
def test_activations_are_those_of_the_forward_pass(kind, model, images, halves, fold):
    adapter = adapter_for(model)
    found = activations(adapter, images, halves=halves, fold=fold)
    h, context = adapter.embed(images)
    assert len(found.hidden) == DEPTH + 1
    for b in range(DEPTH):
        assert torch.equal(found.hidden[b], h)
        an = adapter.attention_input(b, h)
        a = adapter.attention_write(b, an, context)
        mn = adapter.mlp_input(b, h + a)
        m = adapter.mlp_write(b, mn)
        if halves:
            assert torch.equal(found.an[b], an) and torch.equal(found.a[b], a) and torch.equal(found.mn[b], mn)
        if halves or fold:
            assert torch.equal(found.m[b], m)
        h = adapter.block(b, h, context)
    assert torch.equal(found.hidden[-1], h)
    assert (found.an is None, found.a is None, found.mn is None) == (not halves,) * 3
    assert (found.m is None) == (not halves and not fold)


def test_activations_run_each_block_once(images):
    adapter = adapter_for(make_model("vit-classifier"))
    calls = []
    for b, layer in enumerate(adapter.layers):
        layer.mlp.register_forward_hook(lambda module, inputs, output, b=b: calls.append(b))
        layer.attention.register_forward_hook(lambda module, inputs, output, b=b: calls.append(b))
    for halves in (False, True):
        calls.clear()
        activations(adapter, images, halves=halves, fold=True)
        assert calls == [b for b in range(DEPTH) for _ in range(2)]


def test_activations_of_a_compressed_model_leave_out_what_is_replaced(images):
    adapter = adapter_for(compressed_model())
    found = activations(adapter, images, halves=True)
    for b, half_is_there in enumerate([True, False, True, False, True, True]):
        assert [values[b] is not None for values in (found.an, found.a, found.mn, found.m)] == [half_is_there] * 4
    with torch.no_grad():
        reported = adapter.model(images, output_hidden_states=True).hidden_states
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found.hidden, reported, strict=True))


def test_nothing_keeps_a_graph(images):
    adapter = adapter_for(make_model("vit-classifier"))
    plan = CompressionPlan(DEPTH, (Span(1, 2),))
    assert not replay_output(adapter, plan, random_maps(plan), images).requires_grad
    assert not any(h.requires_grad for h in activations(adapter, images, fold=True).hidden)
    assert isinstance(adapter.layers[0].mlp.fc2.weight, nn.Parameter)
