"""Blocks of DINOv2 and their halves. What is imported are the promises of all families, asked of this one."""

import math

import pytest
import torch
from torch import Tensor, nn

from .dinov2_family import DINOV2, Dinov2Family
from .test_blocks import (  # noqa: F401
    test_a_block_takes_any_number_of_tokens,
    test_a_copied_network_makes_the_same_random_choices,
    test_a_drop_path_rate_outside_its_range_is_an_error,
    test_an_unknown_half_is_an_error,
    test_drop_path_follows_the_published_formula,
    test_drop_path_is_off_outside_training,
    test_drop_path_keeps_its_rate_in_bfloat16,
    test_drop_path_rates_grow_linearly_from_zero,
    test_drop_path_skips_the_right_share_of_samples_and_keeps_the_mean,
    test_dropped_samples_are_not_computed_on_a_cpu,
    test_gradient_checkpointing_gives_the_same_gradients,
    test_gradients_of_kept_samples_equal_those_of_the_masked_sum,
    test_halves_compose_to_the_block,
    test_samples_that_are_all_dropped_pass_unchanged_and_give_zero_gradients,
    test_the_first_queries_alone_equal_the_first_tokens_of_the_half,
    tokens,
)


@pytest.fixture(params=[{}, {"use_swiglu_ffn": True}], ids=["mlp", "swiglu"])
def settings(request: pytest.FixtureRequest) -> dict:
    return request.param


@pytest.fixture
def family() -> Dinov2Family:
    return DINOV2


def naive_halves(layer: nn.Module, x: Tensor, swiglu: bool) -> tuple[Tensor, Tensor]:
    """x + s1·W_o concat_h softmax(q kᵀ/√d) v, and y + s2·MLP(y), one image and head at a time."""
    attended = torch.empty_like(x)
    for row, image in enumerate(x):
        normed = layer.norm1(image)
        heads = [getattr(layer.attention, name)(normed).chunk(3, -1) for name in ("q_proj", "k_proj", "v_proj")]
        mixed = [torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), -1) @ v for q, k, v in zip(*heads, strict=True)]
        attended[row] = image + layer.layer_scale1.lambda1 * layer.attention.o_proj(torch.cat(mixed, -1))
    normed = layer.norm2(attended)
    mlp = layer.mlp
    if swiglu:
        gate = mlp.gate_proj(normed)
        write = mlp.down_proj(gate * torch.sigmoid(gate) * mlp.up_proj(normed))
    else:
        write = mlp.fc2(nn.functional.gelu(mlp.fc1(normed)))
    return attended, attended + layer.layer_scale2.lambda1 * write


def test_halves_with_layer_scale_equal_a_naive_block(settings: dict, tokens: Tensor):  # noqa: F811
    layer = DINOV2.own(**settings).layers[1].double()
    attended, whole = naive_halves(layer, tokens.double(), swiglu=bool(settings))
    torch.testing.assert_close(layer(tokens.double(), half="attention"), attended)
    torch.testing.assert_close(layer(attended, half="mlp"), whole)
    torch.testing.assert_close(layer(tokens.double()), whole)


def test_drop_path_works_under_autocast(images: Tensor):
    model = DINOV2.own(drop_path_rate=0.5).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.layernorm(model.layers[2](model.embed(images, torch.ones(4, 16) > 0))).float().sum().backward()
    for name, parameter in model.named_parameters():
        used = name.startswith(("layernorm", "encoder.layer.2", "embeddings")) and "projection" not in name
        assert parameter.grad.isfinite().all() if used else parameter.grad is None or not parameter.grad.any(), name


def test_the_stock_drop_path_of_one_rate_is_gone():
    """It would draw a second time; stock DINOv2 gives every block the rate of the last."""
    for layer in DINOV2.own(drop_path_rate=0.5).layers:
        assert isinstance(layer.drop_path, nn.Identity)
