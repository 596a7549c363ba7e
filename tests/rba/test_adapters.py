"""Each family, opened into pieces, computes what its stock class computes."""

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedModel, ResNetConfig, ResNetModel

from hf_simprune import InputError, models
from hf_simprune.models import SimPruneViTConfig, SimPruneViTModel
from hf_simprune.rba.adapters import adapter_for, module_forward

from .conftest import DEPTH, IMAGE_SIZE, WIDTH, make_model


PROJECTED = ("clip", "clip-projection", "siglip")
CAN_INTERPOLATE_AT_CALL = ("vit", "deit", "clip", "siglip")


def family_of(kind: str) -> str:
    return kind.partition("-")[0]


def stock_output(kind: str, model: PreTrainedModel, images: Tensor) -> Tensor:
    """What the model itself says, by its own forward."""
    resized = tuple(images.shape[-2:]) != (IMAGE_SIZE, IMAGE_SIZE)
    settings = {"interpolate_pos_encoding": True} if resized and family_of(kind) in CAN_INTERPOLATE_AT_CALL else {}
    with torch.no_grad():
        if kind in ("clip", "siglip"):
            return model.get_image_features(pixel_values=images, **settings).pooler_output
        output = model(pixel_values=images, **settings)
    if "logits" in output:
        return output.logits
    if "image_embeds" in output:
        return output.image_embeds
    if family_of(kind) in ("clip", "siglip"):
        return output.pooler_output if output.pooler_output is not None else output.last_hidden_state.mean(1)
    return output.last_hidden_state[:, 0]


@torch.no_grad()
def test_the_pieces_together_give_the_models_own_output(kind, model, images):
    torch.testing.assert_close(
        module_forward(adapter_for(model), images), stock_output(kind, model, images), rtol=1e-6, atol=1e-6
    )


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 48), (16, 40)], ids=str)
def test_images_of_another_size_work_where_the_stock_model_takes_them(kind, model, size):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        module_forward(adapter_for(model), images), stock_output(kind, model, images), rtol=1e-6, atol=1e-6
    )


@torch.no_grad()
def test_hidden_states_are_those_the_model_reports(kind, model, images):
    if kind in ("clip", "siglip", "clip-classifier", "siglip-classifier"):
        model = model.vision_model
    reported = model(pixel_values=images, output_hidden_states=True).hidden_states
    adapter = adapter_for(model)
    h, context = adapter.embed(images)
    assert len(reported) == adapter.depth + 1 == DEPTH + 1
    for b in range(adapter.depth):
        assert torch.equal(h, reported[b])
        h = adapter.block(b, h, context)
    assert torch.equal(h, reported[-1])


@torch.no_grad()
def test_two_halves_make_a_block(model, images):
    adapter = adapter_for(model)
    h, context = adapter.embed(images)
    for b in range(adapter.depth):
        assert adapter.halves(b) == ("attention", "mlp")
        y = h + adapter.attention_write(b, adapter.attention_input(b, h), context)
        whole = adapter.block(b, h, context)
        assert torch.equal(y + adapter.mlp_write(b, adapter.mlp_input(b, y)), whole)
        h = whole


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_last_block_gives_the_tokens_that_the_output_needs(model, images, attention):
    model.set_attn_implementation(attention)
    adapter = adapter_for(model)
    h, context = adapter.embed(images)
    for b in range(adapter.depth - 1):
        h = adapter.block(b, h, context)
    whole = adapter.block(adapter.depth - 1, h, context)
    few = adapter.last_block(h, context)
    count = adapter.output_tokens or whole.shape[1]
    assert few.shape == (3, count, WIDTH)
    torch.testing.assert_close(few, whole[:, :count], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.output(few), adapter.output(whole), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("queries", [1, 3, 5])
def test_attention_of_the_first_tokens_is_that_of_all(model, images, queries):
    adapter = adapter_for(model)
    h, context = adapter.embed(images)
    x = adapter.attention_input(0, h)
    few = adapter.attention_write(0, x, context, queries=queries)
    torch.testing.assert_close(few, adapter.attention_write(0, x, context)[:, :queries], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_features_and_patch_tokens_come_after_the_final_norm(kind, model, images):
    adapter = adapter_for(model)
    h, context = adapter.embed(images)
    for b in range(adapter.depth):
        h = adapter.block(b, h, context)
    tower = adapter.tower
    with torch.no_grad():
        output = tower(pixel_values=images)
    normed = tower.post_layernorm(output.last_hidden_state) if family_of(kind) == "clip" else output.last_hidden_state
    patches = (IMAGE_SIZE // 8) ** 2
    torch.testing.assert_close(adapter.dense(h), normed[:, -patches:], rtol=1e-6, atol=1e-6)
    assert normed.shape[1] == adapter.num_prefix_tokens + patches
    if kind == "siglip-headless":
        expected = normed.mean(1)
    elif family_of(kind) == "siglip":
        expected = output.pooler_output
    else:
        expected = normed[:, 0]
    torch.testing.assert_close(adapter.features(h), expected, rtol=1e-6, atol=1e-6)
    if adapter.head == "none":
        assert torch.equal(adapter.output(h), adapter.features(h))


def test_the_head_is_found(kind, model):
    adapter = adapter_for(model)
    expected = "classifier" if kind.endswith(("classifier", "teacher")) else "none"
    assert adapter.head == ("projection" if kind in PROJECTED else expected)
    assert adapter.family == family_of(kind)
    assert (adapter.depth, adapter.width, adapter.image_size) == (DEPTH, WIDTH, (IMAGE_SIZE, IMAGE_SIZE))


@torch.no_grad()
def test_the_mlp_output_layer_is_the_last_of_the_mlp(model, images):
    """Twice its weight and bias give twice the write, LayerScale or not."""
    adapter = adapter_for(model)
    h, context = adapter.embed(images)
    y = h + adapter.attention_write(1, adapter.attention_input(1, h), context)
    x = adapter.mlp_input(1, y)
    before = adapter.mlp_write(1, x)
    layer = adapter.mlp_output(1)
    assert isinstance(layer, nn.Linear)
    layer.weight.mul_(2)
    layer.bias.mul_(2)
    torch.testing.assert_close(adapter.mlp_write(1, x), 2 * before)
    scale = adapter.mlp_scale(1)
    if scale is not None:
        scale.mul_(3)
        torch.testing.assert_close(adapter.mlp_write(1, x), 6 * before)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit-classifier", "dinov3_vit", "dinov2", "clip", "siglip"])
def test_half_precision_models_take_images_as_the_processor_gives_them(kind, images):
    adapter = adapter_for(make_model(kind).to(torch.bfloat16))
    output = module_forward(adapter, images)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, stock_output(kind, adapter.model, images))


BLOCK_MAPS = {
    "1": {"kind": "linear"},
    "2": {"kind": "block", "attention": "linear", "mlp": "full"},
    "3": {"kind": "block", "attention": "full", "mlp": "const"},
    "4": {"kind": "block", "attention": "const", "mlp": "linear"},
    "5": {"kind": "low_rank", "rank": 3},
}


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "deit", "dinov2"])
def test_a_compressed_model_says_which_halves_are_left(family, images):
    config_class, model_class = {
        "vit": (models.SimPruneViTConfig, models.SimPruneViTForImageClassification),
        "deit": (models.SimPruneDeiTConfig, models.SimPruneDeiTForImageClassification),
        "dinov2": (models.SimPruneDinov2Config, models.SimPruneDinov2ForImageClassification),
    }[family]
    config = make_model(f"{family}-own-classifier").config.to_dict()
    torch.manual_seed(0)
    model = model_class(config_class.from_dict({**config, "block_maps": BLOCK_MAPS})).eval()
    adapter = adapter_for(model)
    both = ("attention", "mlp")
    assert [adapter.halves(b) for b in range(adapter.depth)] == [both, (), ("mlp",), ("attention",), (), ()]
    torch.testing.assert_close(module_forward(adapter, images), model(images).logits, rtol=1e-6, atol=1e-6)

    h, context = adapter.embed(images)
    for b in range(adapter.depth):
        whole = adapter.block(b, h, context)
        if adapter.is_block(b):
            y = h + adapter.attention_write(b, adapter.attention_input(b, h), context)
            assert torch.equal(y + adapter.mlp_write(b, adapter.mlp_input(b, y)), whole)
        if b == adapter.depth - 1:
            few = adapter.last_block(h, context)
            torch.testing.assert_close(few, whole[:, : adapter.output_tokens], rtol=1e-6, atol=1e-6)
        h = whole


def test_an_unsupported_family_is_told_what_is_supported():
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)).eval()
    resnet = ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])).eval()
    for model in (bert, resnet):
        with pytest.raises(
            InputError, match=f"{type(model).__name__}.*ViTModel.*DINOv3ViTModel.*SiglipModel"
        ) as caught:
            adapter_for(model)
        assert "\n" not in str(caught.value)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(InputError, match=r"training mode.*eval\(\)"):
        adapter_for(make_model("vit").train())


def test_a_model_that_reduces_tokens_is_refused():
    config = SimPruneViTConfig.from_stock(make_model("vit").config)
    config.token_reduction, config.keep_rate = "tome", 0.7
    with pytest.raises(InputError, match="token_reduction tome.*take the model without token_reduction"):
        adapter_for(SimPruneViTModel(config).eval())
