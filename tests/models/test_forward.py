"""The whole network computes what the stock one computes, on tiny random weights."""

import pytest
import torch
from torch import Tensor

from hf_simprune.models import SimPruneViTConfig

from .conftest import Family


def twin(family: Family, tmp_path, kind: str = "model", **kwargs):
    stock = family.stock(kind)
    stock.save_pretrained(tmp_path)
    own = (family.model if kind == "model" else family.classifier).from_pretrained(tmp_path, **kwargs)
    return stock, own


def test_features_equal_the_stock_model(family: Family, tmp_path, images: Tensor):
    stock, own = twin(family, tmp_path)
    expected, got = stock(images), own(images)
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(got.pooler_output, expected.pooler_output)


def test_logits_and_loss_equal_the_stock_classifier(family: Family, tmp_path, images: Tensor):
    stock, own = twin(family, tmp_path, "classifier")
    labels = torch.tensor([0, 1, 1, 0])
    expected, got = stock(images, labels=labels), own(images, labels=labels)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree_with_stock(family: Family, tmp_path, images: Tensor, attention: str):
    stock, own = twin(family, tmp_path, attn_implementation=attention)
    stock.set_attn_implementation(attention)
    assert own.config._attn_implementation == attention
    assert torch.equal(own(images).last_hidden_state, stock(images).last_hidden_state)


def test_flash_attention_is_selected_as_in_stock(family: Family):
    """Where flash attention is not installed both refuse it with the same words; where it is, both take it."""
    outcomes = []
    for model_class, config_class in ((family.stock_model, family.stock_config), (family.model, family.config)):
        try:
            config = config_class(num_hidden_layers=1, attn_implementation="flash_attention_2")
            outcomes.append(model_class(config).config._attn_implementation)
        except (ImportError, ValueError) as error:
            outcomes.append(str(error).replace(family.model.__name__, family.stock_model.__name__))
    assert outcomes[0] == outcomes[1]


def test_attention_weights_are_recorded(family: Family, tmp_path, images: Tensor):
    stock, own = twin(family, tmp_path, attn_implementation="eager")
    stock.set_attn_implementation("eager")
    expected, got = (model(images, output_attentions=True).attentions for model in (stock, own))
    assert len(got) == len(expected) == 3
    for weights, stock_weights in zip(got, expected, strict=True):
        assert torch.equal(weights, stock_weights)


def test_hidden_states_are_the_input_and_one_per_block(family: Family, tmp_path, images: Tensor):
    stock, own = twin(family, tmp_path, drop_path_rate=0.1)
    expected, got = (model(images, output_hidden_states=True).hidden_states for model in (stock, own))
    assert len(got) == len(expected) == 4
    for state, stock_state in zip(got, expected, strict=True):
        assert torch.equal(state, stock_state)
    assert torch.equal(got[0], own.embed(images))
    assert torch.equal(got[1], own.layers[0](got[0]))


def test_embed_blocks_and_norm_give_the_features(family: Family, images: Tensor):
    model = family.own()
    tokens = model.embed(images)
    assert tokens.shape == (4, family.num_prefix + 16, 24)
    assert model.num_prefix_tokens == family.num_prefix
    for layer in model.layers:
        tokens = layer(tokens)
    assert torch.equal(model.layernorm(tokens), model(images).last_hidden_state)


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (48, 48), (64, 16)])
def test_position_embeddings_are_interpolated_for_other_sizes(family: Family, tmp_path, size: tuple[int, int]):
    stock, own = twin(family, tmp_path)
    crops = torch.randn(2, 3, *size)
    expected = stock(crops, interpolate_pos_encoding=True, output_hidden_states=True)
    assert torch.equal(own.embed(crops), expected.hidden_states[0])
    assert torch.equal(own(crops, interpolate_pos_encoding=True).last_hidden_state, expected.last_hidden_state)


def test_forward_refuses_another_size_as_stock_does(family: Family):
    with pytest.raises(ValueError, match=r"Input image size \(16\*16\) doesn't match model"):
        family.own()(torch.randn(1, 3, 16, 16))


def test_position_embeddings_receive_gradients_through_interpolation(family: Family):
    model = family.own()
    model.embed(torch.randn(1, 3, 16, 16)).square().sum().backward()
    gradient = model.embeddings.position_embeddings.grad
    assert (gradient.abs().sum(dim=-1) > 0).all()


def test_layer_norm_epsilon_is_dinos_by_default():
    assert SimPruneViTConfig().layer_norm_eps == 1e-6


def test_cls_is_the_first_token(family: Family, images: Tensor):
    model = family.own()
    positions = model.embeddings.position_embeddings[0, 0]
    expected = (model.embeddings.cls_token[0, 0] + positions).expand(4, -1)
    assert torch.equal(model.embed(images)[:, 0], expected)


def test_initialisation_is_dinos(family: Family):
    torch.manual_seed(0)
    config = family.config(hidden_size=192, num_hidden_layers=1, image_size=32, patch_size=4)
    model = family.model(config, add_pooling_layer=False)
    for name, parameter in model.named_parameters():
        if "patch_embeddings" in name:  # torch's default for convolutions: uniform within 1 / sqrt(fan_in)
            bound = (3 * 4 * 4) ** -0.5
            assert parameter.abs().max() <= bound and parameter.abs().max() > 0.95 * bound, name
        elif "layernorm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
