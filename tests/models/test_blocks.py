"""Blocks and their halves: arithmetic, stochastic depth, gradient checkpointing."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from .conftest import Family


def naive_attention_half(layer: nn.Module, tokens: Tensor, heads: int) -> Tensor:
    """x + W_o · concat_h softmax(q kᵀ / √d) v, one image and head at a time."""
    out = tokens.clone()
    for row, image in enumerate(tokens):
        normed = layer.layernorm_before(image)
        q, k, v = (getattr(layer.attention, name)(normed) for name in ("q_proj", "k_proj", "v_proj"))
        d = q.shape[-1] // heads
        mixed = []
        for head in range(heads):
            part = slice(head * d, (head + 1) * d)
            mixed.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(d), dim=-1) @ v[:, part])
        out[row] = image + layer.attention.o_proj(torch.cat(mixed, dim=-1))
    return out


def naive_mlp_half(layer: nn.Module, tokens: Tensor) -> Tensor:
    return tokens + layer.mlp.fc2(nn.functional.gelu(layer.mlp.fc1(layer.layernorm_after(tokens))))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(5, 17, 24, generator=torch.Generator().manual_seed(2))


def test_halves_equal_a_naive_block(family: Family, tokens: Tensor):
    layer = family.own().layers[1].double()
    tokens = tokens.double()
    attended = naive_attention_half(layer, tokens, heads=3)
    torch.testing.assert_close(layer(tokens, half="attention"), attended)
    torch.testing.assert_close(layer(tokens, half="mlp"), naive_mlp_half(layer, tokens))
    torch.testing.assert_close(layer(tokens), naive_mlp_half(layer, attended))


@pytest.mark.parametrize("training", [False, True])
def test_halves_compose_to_the_block(family: Family, tokens: Tensor, training: bool):
    layer = family.own(drop_path_rate=0.5).train(training).layers[2]
    torch.manual_seed(3)
    whole = layer(tokens)
    torch.manual_seed(3)
    halves = layer(layer(tokens, half="attention"), half="mlp")
    assert torch.equal(whole, halves)


def test_a_block_takes_any_number_of_tokens(family: Family, tokens: Tensor):
    layer = family.own().layers[0]
    fewer = layer(tokens[:, :7], half="mlp")
    # The MLP acts on each token alone.
    torch.testing.assert_close(fewer, layer(tokens, half="mlp")[:, :7])


def test_an_unknown_half_is_an_error(family: Family, tokens: Tensor):
    with pytest.raises(ValueError, match="half must be None, 'attention' or 'mlp', got 'ffn'"):
        family.own().layers[0](tokens, half="ffn")


def test_drop_path_rates_grow_linearly_from_zero(family: Family):
    rates = [layer.drop_path_rate for layer in family.own(drop_path_rate=0.3).layers]
    assert rates == pytest.approx([0.0, 0.15, 0.3])


def test_drop_path_follows_the_published_formula(family: Family, tokens: Tensor):
    layer = family.own(drop_path_rate=0.4).train().layers[2]
    torch.manual_seed(5)
    ours = layer(tokens, half="attention")
    plain = layer.eval()(tokens, half="attention") - tokens
    # DINO: x.div(keep) * floor(keep + U), one draw a sample.
    torch.manual_seed(5)
    mask = torch.floor(0.6 + torch.rand(5, 1, 1))
    assert 0 < mask.sum() < 5
    torch.testing.assert_close(ours, tokens + plain.div(0.6) * mask)


def test_drop_path_skips_the_right_share_of_samples_and_keeps_the_mean(family: Family):
    layer = family.own(drop_path_rate=0.25).train().layers[2]
    tokens = torch.randn(1, 3, 24).expand(4000, 3, 24)
    torch.manual_seed(6)
    change = layer(tokens, half="mlp") - tokens
    skipped = (change.abs().amax(dim=(1, 2)) == 0).float().mean().item()
    assert skipped == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    expected = layer.eval()(tokens[:1], half="mlp") - tokens[:1]
    kept = change[change.abs().amax(dim=(1, 2)) > 0]
    torch.testing.assert_close(kept, (expected / 0.75).expand_as(kept), atol=1e-5, rtol=1e-5)


def test_drop_path_keeps_its_rate_in_bfloat16(family: Family):
    layer = family.own(drop_path_rate=0.01).train().bfloat16().layers[2]
    tokens = torch.randn(1, 2, 24).expand(20000, 2, 24).bfloat16()
    torch.manual_seed(7)
    change = layer(tokens, half="mlp") - tokens
    skipped = (change.abs().amax(dim=(1, 2)) == 0).float().mean().item()
    assert skipped == pytest.approx(0.01, abs=4 * math.sqrt(0.01 * 0.99 / 20000))


def test_drop_path_is_off_outside_training(family: Family, images: Tensor):
    rate_zero, rate_half = family.own(), family.own(drop_path_rate=0.5)
    assert torch.equal(rate_half(images).last_hidden_state, rate_zero(images).last_hidden_state)
    rate_half.train()
    assert not torch.equal(rate_half(images).last_hidden_state, rate_zero(images).last_hidden_state)


def test_drop_path_works_under_autocast(family: Family, images: Tensor):
    model = family.own(drop_path_rate=0.5).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images).last_hidden_state.float().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_a_drop_path_rate_outside_its_range_is_an_error(family: Family, rate: float):
    with pytest.raises(Exception, match="drop_path_rate must be at least 0 and below 1"):
        family.config(drop_path_rate=rate)


def test_a_copied_network_makes_the_same_random_choices(family: Family, images: Tensor):
    """A copy that were to run all samples through a block would draw other dropout masks than its original."""
    network = family.own(drop_path_rate=0.7, attention_probs_dropout_prob=0.5).train()
    outputs = []
    for model in (network, copy.deepcopy(network)):
        torch.manual_seed(4)
        outputs.append(model(images).last_hidden_state)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    family: Family, images: Tensor, halves: bool, use_reentrant: bool
):
    plain = family.own(drop_path_rate=0.5).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    recomputed = []
    checkpointed.layers[1].mlp.register_forward_hook(lambda *_: recomputed.append(1))
    gradients = []
    for model in (plain, checkpointed):
        torch.manual_seed(8)
        tokens = model.embed(images)
        for layer in model.layers:
            tokens = layer(layer(tokens, half="attention")[:, :-2], half="mlp") if halves else layer(tokens)
        model.layernorm(tokens).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(recomputed) == 2
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_first_queries_alone_equal_the_first_tokens_of_the_half(
    family: Family, tokens: Tensor, implementation: str, count: int
):
    model = family.own(drop_path_rate=0.5).train().double()
    model.set_attn_implementation(implementation)
    results = []
    for arguments in ({}, {"num_queries": count}):
        torch.manual_seed(9)
        model.zero_grad()
        first = model.layers[2](tokens.double(), half="attention", **arguments)[:, :count]
        first.square().sum().backward()
        results.append([first, *(p.grad for p in model.layers[2].attention.parameters())])
    assert results[1][0].shape == (5, count, 24)
    for fewer, whole in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(fewer, whole)


def test_samples_that_are_all_dropped_pass_unchanged_and_give_zero_gradients(family: Family, tokens: Tensor):
    layer = family.own(drop_path_rate=0.999999).train().layers[2]
    tokens = tokens.requires_grad_()
    output = layer(tokens)
    assert torch.equal(output, tokens)
    output.sum().backward()
    assert torch.equal(tokens.grad, torch.ones_like(tokens))
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_dropped_samples_are_not_computed_on_a_cpu(family: Family, tokens: Tensor):
    layer = family.own(drop_path_rate=0.4).train().layers[2]
    seen = []
    layer.mlp.register_forward_hook(lambda module, arguments, output: seen.append(len(arguments[0])))
    torch.manual_seed(5)
    change = layer(tokens, half="mlp") - tokens
    assert seen == [int((change.abs().amax(dim=(1, 2)) > 0).sum())]
    assert 0 < seen[0] < len(tokens)


@pytest.mark.parametrize("shape", [None, (5, 1, 1, 17), (5, 1, 17, 17), (1, 1, 17, 17)])
def test_gradients_of_kept_samples_equal_those_of_the_masked_sum(family: Family, tokens: Tensor, shape):
    layer = family.own(drop_path_rate=0.4).train().double().layers[2]
    tokens = tokens.double()
    mask = None if shape is None else torch.randn(shape, dtype=torch.float64)
    gradients = []
    for functions in (layer.functions, layer.functions._replace()):  # functions of one's own select the masked sum
        layer.functions = functions
        layer.zero_grad()
        leaf = tokens.clone().requires_grad_()
        torch.manual_seed(5)
        layer(leaf, mask).square().sum().backward()
        gradients.append([leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for kept, masked in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, masked)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 17])
def test_the_first_queries_take_a_bias_of_the_keys(family: Family, tokens: Tensor, implementation: str, rows: int):
    model = family.own().double()
    model.set_attn_implementation(implementation)
    bias = torch.randn(5, 1, rows, 17, dtype=torch.float64)
    whole = model.layers[1](tokens.double(), bias, half="attention")
    first = model.layers[1](tokens.double(), bias, half="attention", num_queries=3)
    torch.testing.assert_close(first, whole[:, :3])
    assert not torch.allclose(whole, model.layers[1](tokens.double(), half="attention"))
