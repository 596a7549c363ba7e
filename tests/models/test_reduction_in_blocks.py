"""A block that makes its tokens fewer, against plain loops; drop path, checkpointing, compilation, recording."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import Tensor

from hf_simprune.errors import InputError
from hf_simprune.reduction import BranchReducer, BranchWalk, Kept, ReductionSetting, ReductionStep, Seen

from .conftest import VIT, Family
from .test_replaced_blocks import build
from .tiny_reducers import TINY_REDUCERS, KeepAttended, KeepLarge, KeepLongKeys, MergeInside, MergeKeys, naive_pass


KEEP = 0.6  # of 16 tokens 10 stay, then 6


@pytest.fixture(params=TINY_REDUCERS, ids=lambda reducer: reducer.name)
def reducer(request: pytest.FixtureRequest) -> BranchReducer:
    return request.param(KEEP, ReductionSetting(layers=(0, 1), depth=3))


def walk_through(model, images: Tensor, reducer: BranchReducer, **kwargs) -> tuple[list[Tensor], BranchWalk]:
    """The tokens behind every block, and the walk."""
    walk = BranchWalk(reducer, model.num_prefix_tokens, (4, 4), records_before=True)
    states, tokens = [], model.embed(images)
    for index, layer in enumerate(model.layers):
        tokens = walk.block(index, layer, tokens, **kwargs)
        states.append(tokens)
    return states, walk


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_pass_equals_plain_loops(family: Family, images: Tensor, reducer: BranchReducer, implementation: str):
    model = family.own().double()
    model.set_attn_implementation(implementation)
    states, walk = walk_through(model, images.double(), reducer)
    restored = walk.restore(states[-1])
    assert [state.shape[1] - family.num_prefix for state in states] == [10, 6, 6] and restored.shape == (
        4, 16 + family.num_prefix, 24,
    )  # fmt: skip
    for row, image in enumerate(model.embed(images.double())):
        expected, expected_restored, _ = naive_pass(model.layers, image, reducer, family.num_prefix, heads=3)
        for state, expected_state in zip(states, expected, strict=True):
            # Evidence and eager softmax are float32.
            torch.testing.assert_close(state[row], expected_state, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(restored[row], expected_restored, atol=1e-5, rtol=1e-5)


def test_attention_weights_of_every_block_are_what_stock_records(
    family: Family, images: Tensor, reducer: BranchReducer
):
    model = family.own()
    model.set_attn_implementation("eager")
    recorded = []
    for layer in model.layers:
        layer.attention.register_forward_hook(lambda module, arguments, output: recorded.append(output[1]))
    plain, _ = walk_through(model, images, reducer)
    recorded.clear()
    states, _ = walk_through(model, images, reducer, output_attentions=True)
    assert len(recorded) == 3
    for state, expected in zip(states, plain, strict=True):
        torch.testing.assert_close(state, expected)
    for row, image in enumerate(model.embed(images)):
        maps = naive_pass(model.layers, image, reducer, family.num_prefix, heads=3)[2]
        for weights, expected in zip(recorded, maps, strict=True):
            torch.testing.assert_close(weights[row], expected, atol=1e-5, rtol=1e-4)


def test_samples_that_stochastic_depth_skips_give_the_same_gradients(
    family: Family, images: Tensor, reducer: BranchReducer
):
    model = family.own(drop_path_rate=0.5).train().double()
    gradients = []
    for functions in (
        model.layers[0].functions,
        model.layers[0].functions._replace(),
    ):  # as on a GPU: nobody is left out
        for layer in model.layers:
            layer.functions = functions
        model.zero_grad()
        torch.manual_seed(5)
        states, _ = walk_through(model, images.double(), reducer)
        states[-1].square().sum().backward()
        gradients.append([states[-1], *(p.grad.clone() for p in model.layers.parameters())])
    for kept, masked in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, masked)


def test_stochastic_depth_scales_both_halves_of_a_reduced_block(family: Family, images: Tensor, reducer):
    """With all samples kept by both halves, the updates are those of evaluation over the keep probability."""
    model = family.own(drop_path_rate=0.25).double()
    layer, tokens = model.layers[2], model.embed(images.double())
    reducer.setting = ReductionSetting(layers=(2,), depth=3)

    def run(keep: float) -> Tensor:
        if keep < 1:
            layer._residual_scale = lambda hidden_states: hidden_states.new_full((4, 1, 1), 1 / keep)
        return BranchWalk(reducer, family.num_prefix, (4, 4)).block(2, layer, tokens)

    assert torch.equal(run(1.0), run(1.0))
    scaled = copy.deepcopy(layer)
    with torch.no_grad():
        for linear in (scaled.attention.o_proj, scaled.mlp.fc2):
            linear.weight.mul_(1 / 0.75)
            linear.bias.mul_(1 / 0.75)
    expected = BranchWalk(reducer, family.num_prefix, (4, 4)).block(2, scaled, tokens)
    torch.testing.assert_close(run(0.75), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_decides_once_and_gives_the_same_gradients(
    family: Family, images: Tensor, reducer: BranchReducer, use_reentrant: bool
):
    plain = family.own(drop_path_rate=0.3).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    recomputed, gradients = [], []
    checkpointed.layers[1].mlp.register_forward_hook(lambda *_: recomputed.append(1))
    for model in (plain, checkpointed):
        torch.manual_seed(8)
        walk = BranchWalk(reducer, family.num_prefix, (4, 4), records_before=not use_reentrant)
        tokens = model.embed(images)
        for index, layer in enumerate(model.layers):
            tokens = walk.block(index, layer, tokens)
        walk.restore(tokens).square().mean().backward() if not use_reentrant else tokens.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(recomputed) == 2 and reducer.decisions == 4
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_restoring_through_reentrant_checkpoints_is_an_error(family: Family, images: Tensor, reducer: BranchReducer):
    model = family.own().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(InputError, match="use_reentrant=False"):
        walk_through(model, images, reducer)
    with torch.no_grad():  # where there is nothing to lose
        walk_through(model, images, reducer)


@pytest.mark.parametrize("kind", [KeepLarge, KeepLongKeys, MergeKeys], ids=lambda kind: kind.name)
def test_compiled_blocks_reduce_as_plain_ones(images: Tensor, kind: type[BranchReducer]):
    torch._dynamo.reset()
    plain = VIT.own(drop_path_rate=0.5).train()
    compiled = copy.deepcopy(plain)
    compiled.compile_blocks(backend="eager", fullgraph=True)
    results = []
    for model in (plain, compiled):
        torch.manual_seed(0)
        states, _ = walk_through(model, images, kind(KEEP, ReductionSetting(layers=(0, 1), depth=3)))
        states[-1].square().mean().backward()
        results.append(states[-1])
    torch.testing.assert_close(results[1], results[0])
    for (name, got), expected in zip(compiled.layers.named_parameters(), plain.layers.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=name)
    torch._dynamo.reset()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_keeps_its_type_and_stays_close(
    family: Family, images: Tensor, reducer: BranchReducer, implementation: str, autocast: bool
):
    model = family.own()
    model.set_attn_implementation(implementation)
    reducer.keep_rate = 1.0 if reducer.site != "attention" else KEEP  # rounding changes who stays
    expected, _ = walk_through(model, images, reducer)
    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states, _ = walk_through(model, images, reducer)
        assert {state.dtype for state in states} <= {torch.float32, torch.bfloat16}
    else:
        states, _ = walk_through(model.to(torch.bfloat16), images, reducer)
        assert {state.dtype for state in states} == {torch.bfloat16}
    prefix = family.num_prefix
    difference = (states[-1][:, :prefix].float() - expected[-1][:, :prefix]).norm() / expected[-1][:, :prefix].norm()
    assert difference < 0.1


@pytest.mark.parametrize("needs", ["cls_attention", "keys"])
def test_evidence_is_float32_whatever_surrounds_it(family: Family, images: Tensor, needs: str):
    """Of bfloat16 keys and queries, in full precision: rounding the scores would tie tokens."""
    model = family.own()
    seen = []

    class Watch(KeepAttended if needs == "cls_attention" else KeepLongKeys):
        def choose(self, given: Seen) -> Kept:
            seen.append(given.attention)
            return super().choose(given)

    reducer = Watch(1.0, ReductionSetting(layers=(0,), depth=3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = model.embed(images)
        layer = model.layers[0]
        BranchWalk(reducer, family.num_prefix, (4, 4)).block(0, layer, tokens)
        normed = layer.layernorm_before(tokens)
        query, key = layer.attention.q_proj(normed), layer.attention.k_proj(normed)
    assert key.dtype == torch.bfloat16
    q, k = (x.float().unflatten(-1, (3, 8)).transpose(1, 2) for x in (query, key))
    if needs == "keys":
        expected = k.mean(1)[:, family.num_prefix :]
    else:
        expected = (q[:, :, :1] @ k.mT / math.sqrt(8)).softmax(-1).mean(1)[:, 0, family.num_prefix :]
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [KeepAttended, KeepLongKeys])
def test_no_more_than_a_row_of_the_attention_map_is_made(family: Family, images: Tensor, kind):
    """Where a row or the keys are enough, attention stays with the fused kernel."""
    model = family.own()
    shapes = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            output = function(*arguments, **(kwargs or {}))
            shapes.extend(tuple(o.shape) for o in [output] if isinstance(o, Tensor))
            return output

    count = 16 + family.num_prefix
    with Shapes(), torch.no_grad():
        walk_through(model, images, kind(1.0, ReductionSetting(layers=(0, 1, 2), depth=3)))
    assert not [shape for shape in shapes if shape[-2:] == (count, count)]


def test_attention_dropout_falls_on_the_pooled_map(family: Family, images: Tensor):
    model = family.own(attention_probs_dropout_prob=0.5).train()
    layer, tokens = model.layers[0], model.embed(images)
    runs = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        walk = BranchWalk(MergeInside(KEEP, ReductionSetting(layers=(0,), depth=3)), family.num_prefix, (4, 4))
        runs.append(walk.block(0, layer, tokens))
    assert torch.equal(runs[0], runs[2]) and not torch.allclose(runs[0], runs[1], atol=1e-3)


@pytest.mark.parametrize("kind", [MergeInside, MergeKeys])
def test_flash_attention_cannot_count_merged_tokens(family: Family, images: Tensor, kind):
    model = family.own()
    tokens = model.embed(images)
    walk = BranchWalk(kind(KEEP, ReductionSetting(layers=(0,), depth=3)), family.num_prefix, (4, 4))
    tokens = walk.block(0, model.layers[0], tokens)
    model.config._attn_implementation = "flash_attention_2"
    for arguments in ({}, {"half": "attention", "num_queries": 1}):
        with pytest.raises(ValueError, match=r"flash_attention_2.*proportional=false.*'sdpa'"):
            model.layers[1](tokens, walk.key_bias(tokens), **arguments)


def test_reduction_takes_a_whole_block_with_attention(family: Family, images: Tensor):
    model = build(family)
    tokens = model.embed(images)

    def step(kind) -> ReductionStep:
        reducer = kind(KEEP, ReductionSetting(layers=(0,), depth=8))
        return ReductionStep(BranchWalk(reducer, family.num_prefix, (4, 4)), 0)

    for half in ("attention", "mlp"):
        with pytest.raises(ValueError, match=f"takes the whole block, got half '{half}'"):
            model.layers[7](tokens, half=half, reduction=step(KeepLarge))
    with pytest.raises(ValueError, match="a replaced block has no halves: tokens cannot be reduced there"):
        model.layers[1](tokens, reduction=step(KeepLarge))
    for kind in (KeepAttended, MergeInside):
        with pytest.raises(ValueError, match="whose attention is replaced: there is none to decide from"):
            model.layers[0](tokens, reduction=step(kind))
    assert model.layers[0](tokens, reduction=step(KeepLarge)).shape[1] == 10 + family.num_prefix


def test_a_pass_leaves_nothing_behind_for_the_garbage_collector(family: Family, images: Tensor, reducer):
    """Activations that are kept for restoring go with the walk, not some time later."""
    gc.collect()
    gc.disable()
    try:
        states, walk = walk_through(family.own(), images, reducer)
        step = weakref.ref(walk.steps[0])
        del states, walk
        assert step() is None
    finally:
        gc.enable()
