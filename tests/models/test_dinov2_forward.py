"""The whole DINOv2 computes what the stock one computes. What is imported are the promises of all families."""

import pytest
import torch
from torch import Tensor

from hf_simprune.models.architectures import build_backbone

from .dinov2_family import DINOV2, SIZES, Dinov2Family
from .test_forward import (  # noqa: F401
    test_attention_implementations_agree_with_stock,
    test_attention_weights_are_recorded,
    test_cls_is_the_first_token,
    test_embed_blocks_and_norm_give_the_features,
    test_features_equal_the_stock_model,
    test_flash_attention_is_selected_as_in_stock,
    test_hidden_states_are_the_input_and_one_per_block,
    test_logits_and_loss_equal_the_stock_classifier,
)


@pytest.fixture
def family() -> Dinov2Family:
    return DINOV2


@pytest.fixture
def masks() -> Tensor:
    return torch.rand(4, 16, generator=torch.Generator().manual_seed(3)) < 0.4


@pytest.mark.parametrize("kind", ["model", "classifier"])
@pytest.mark.parametrize("settings", [{}, {"use_swiglu_ffn": True}, {"use_mask_token": False}, {"qkv_bias": False}])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_outputs_equal_the_stock_network(tmp_path, images: Tensor, kind: str, settings: dict, precision: torch.dtype):
    stock = DINOV2.stock(kind, **settings).to(precision)
    stock.save_pretrained(tmp_path)
    own = (DINOV2.model if kind == "model" else DINOV2.classifier).from_pretrained(tmp_path)
    assert own.dtype == precision
    for got, expected in zip(own(images).to_tuple(), stock(images).to_tuple(), strict=True):
        assert torch.equal(got, expected)


def test_gradients_equal_those_of_the_stock_network(tmp_path, images: Tensor, masks: Tensor):
    stock = DINOV2.stock().train()
    stock.save_pretrained(tmp_path)
    own = DINOV2.model.from_pretrained(tmp_path).train()
    for model in (stock, own):
        model(images, bool_masked_pos=masks).last_hidden_state.square().mean().backward()
    for (name, got), expected in zip(own.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(got.grad, expected.grad), name


def test_masked_patches_get_the_mask_token_and_their_position(images: Tensor, masks: Tensor):
    model = DINOV2.own()
    tokens, plain = model.embed(images, masks), model.embed(images)
    token, positions = model.embeddings.mask_token[0], model.embeddings.position_embeddings[0]
    for image in range(4):
        torch.testing.assert_close(tokens[image, 0], plain[image, 0])
        for patch in range(16):
            expected = token + positions[1 + patch] if masks[image, patch] else plain[image, 1 + patch]
            torch.testing.assert_close(tokens[image, 1 + patch], expected)
    assert masks.any() and not masks.all()
    assert torch.equal(model.embed(images, torch.zeros_like(masks)), plain)


def test_masks_equal_those_of_the_stock_network(tmp_path, images: Tensor, masks: Tensor):
    stock = DINOV2.stock()
    stock.save_pretrained(tmp_path)
    own = DINOV2.model.from_pretrained(tmp_path)
    expected = stock(images, bool_masked_pos=masks, output_hidden_states=True)
    assert torch.equal(own.embed(images, masks), expected.hidden_states[0])
    assert torch.equal(own(images, bool_masked_pos=masks).last_hidden_state, expected.last_hidden_state)


def test_masks_without_a_mask_token_are_an_error(images: Tensor, masks: Tensor):
    with pytest.raises(ValueError, match="masks: this network has no mask token.*use_mask_token=False"):
        DINOV2.own(use_mask_token=False).embed(images, masks)


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (48, 48), (64, 16)])
def test_position_embeddings_are_interpolated_for_other_sizes(tmp_path, size: tuple[int, int]):
    stock = DINOV2.stock()
    stock.save_pretrained(tmp_path)
    own = DINOV2.model.from_pretrained(tmp_path)
    crops = torch.randn(2, 3, *size)
    masks = torch.rand(2, size[0] * size[1] // 64) < 0.5
    expected = stock(crops, bool_masked_pos=masks, output_hidden_states=True)
    assert torch.equal(own.embed(crops, masks), expected.hidden_states[0])
    assert torch.equal(own(crops, bool_masked_pos=masks).last_hidden_state, expected.last_hidden_state)


def test_position_embeddings_and_the_mask_token_receive_gradients_through_interpolation():
    model = DINOV2.own()
    model.embed(torch.randn(1, 3, 16, 16), torch.tensor([[True, False, True, False]])).square().sum().backward()
    embeddings = model.embeddings
    assert (embeddings.position_embeddings.grad.abs().sum(dim=-1) > 0).all()
    assert embeddings.mask_token.grad.any()


def test_there_is_no_pooler_to_add(images: Tensor):
    config = DINOV2.config(**SIZES)
    model = DINOV2.model(config, add_pooling_layer=False).eval()
    output = model(images)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    with pytest.raises(ValueError, match="add_pooling_layer=True: DINOv2 has no pooler"):
        DINOV2.model(config, add_pooling_layer=True)


def test_blocks_go_by_the_name_that_all_families_have(images: Tensor):
    model = DINOV2.own()
    assert model.layers is model.encoder.layer and model.num_prefix_tokens == 1
    assert {name.split(".")[0] for name in model.state_dict()} == {"embeddings", "encoder", "layernorm"}


def test_initialisation_is_dinos_with_layer_scale():
    torch.manual_seed(0)
    model = build_backbone("dinov2_tiny", 56, num_hidden_layers=1)
    for name, parameter in model.named_parameters():
        if "patch_embeddings" in name:  # torch's default for convolutions: uniform within 1 / sqrt(fan_in)
            bound = (3 * 14 * 14) ** -0.5
            assert parameter.abs().max() <= bound and parameter.abs().max() > 0.9 * bound, name
        elif "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        elif "lambda1" in name:
            assert torch.equal(parameter, torch.full_like(parameter, 1e-5)), name
        elif name.endswith("bias") or "mask_token" in name:
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
