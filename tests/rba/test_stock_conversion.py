"""Folded and shortened models are stock models, in memory and in their folder."""

import copy
import json

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    PreTrainedModel,
)

from hf_simprune import InputError, models
from hf_simprune.rba.adapters import adapter_for, module_forward
from hf_simprune.rba.maps import AffineMap, FittedMaps
from hf_simprune.rba.plan import CompressionPlan, Half, Span
from hf_simprune.rba.replay import replay_output
from hf_simprune.rba.stock_conversion import convert_to_stock, fits_stock, fold_into

from .conftest import DEPTH, KINDS, LABELS, WIDTH, make_model


TWO_FOLDS = CompressionPlan(DEPTH, (Span(1, 2), Span(3, 4), Span(5, 6, "identity")))
STOCK_CLASS = {
    "vit-own": "ViTModel",
    "vit-own-classifier": "ViTForImageClassification",
    "deit-own": "DeiTModel",
    "deit-own-classifier": "DeiTForImageClassification",
    "dinov2-own": "Dinov2Model",
    "dinov2-own-classifier": "Dinov2ForImageClassification",
}
AUTO_CLASS = {
    "clip": AutoModelForZeroShotImageClassification,
    "siglip": AutoModelForZeroShotImageClassification,
    "clip-projection": transformers.CLIPVisionModelWithProjection,
    "deit-teacher": transformers.DeiTForImageClassificationWithTeacher,
    "vit-no-labels": transformers.ViTForImageClassification,
}


def random_maps(plan: CompressionPlan) -> FittedMaps:
    generator = torch.Generator().manual_seed(3)
    return {
        span: AffineMap(
            torch.eye(WIDTH) + 0.2 * torch.randn(WIDTH, WIDTH, generator=generator),
            0.2 * torch.randn(WIDTH, generator=generator),
        )
        for span in plan.spans
        if span.map == "fold"
    }


@torch.no_grad()
def output(model: PreTrainedModel, images: Tensor) -> Tensor:
    return module_forward(adapter_for(model), images)


@torch.no_grad()
def everything(model: PreTrainedModel, images: Tensor) -> dict[str, Tensor]:
    """All that the model's own forward gives, text included."""
    inputs = {"pixel_values": images}
    if isinstance(model, (transformers.CLIPModel, transformers.SiglipModel)):
        inputs["input_ids"] = torch.tensor([[0, 5, 7, 9, 1]] * len(images))
    found = model(**inputs, output_hidden_states=True)
    flat = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if "hidden_states" in found:
        flat |= {f"hidden_states.{index}": value for index, value in enumerate(found.hidden_states)}
    return flat


def load(kind: str, folder, **settings) -> PreTrainedModel:
    default = AutoModelForImageClassification if kind.endswith("classifier") else AutoModel
    return AUTO_CLASS.get(kind, default).from_pretrained(folder, **settings)


@torch.no_grad()
def test_the_stock_model_computes_what_the_plan_says(kind, model, images):
    maps = random_maps(TWO_FOLDS)
    expected = replay_output(adapter_for(model), TWO_FOLDS, maps, images)
    stock = convert_to_stock(model, TWO_FOLDS, maps)
    torch.testing.assert_close(output(stock, images), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, output(model, images), rtol=1e-2, atol=1e-2)


def test_the_class_is_stock_and_the_layers_are_fewer(kind, model):
    stock = convert_to_stock(model, TWO_FOLDS, random_maps(TWO_FOLDS))
    assert type(stock).__module__.startswith("transformers.models.")
    assert type(stock).__name__ == STOCK_CLASS.get(kind, type(model).__name__)
    assert type(stock.config).__module__.startswith("transformers.models.")
    adapter = adapter_for(stock)
    assert adapter.blocks_config(stock.config).num_hidden_layers == adapter.tower.config.num_hidden_layers == 3
    assert len(adapter.layers) == 3
    assert not stock.training and all(parameter.requires_grad for parameter in stock.parameters())
    assert all(tensor.device.type == "cpu" for tensor in (*stock.parameters(), *stock.buffers()))


def test_a_saved_folder_loads_bit_equal(kind, model, images, tmp_path):
    stock = convert_to_stock(model, TWO_FOLDS, random_maps(TWO_FOLDS))
    stock.save_pretrained(tmp_path)
    torch.manual_seed(5)
    loaded, info = load(kind, tmp_path, output_loading_info=True)
    assert type(loaded) is type(stock)
    assert not any(info[key] for key in ("missing_keys", "mismatched_keys"))
    assert {key for key in info["unexpected_keys"] if not key.endswith("mask_token")} == set()
    before, after = everything(stock, images), everything(loaded, images)
    assert before.keys() == after.keys() and len(before) > 1
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(output(stock, images), output(loaded, images))
    config = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in config and not config["model_type"].startswith("simprune")


def test_all_but_the_blocks_is_as_it_was(kind, model):
    """Embeddings, norms, heads, poolers and the text tower, to the bit."""
    stock = convert_to_stock(model, TWO_FOLDS, random_maps(TWO_FOLDS))
    blocks = next(name for name, module in model.named_modules() if module is adapter_for(model).layers) + "."
    before = {name: value for name, value in model.state_dict().items() if not name.startswith(blocks)}
    after = {name: value for name, value in stock.state_dict().items() if not name.startswith(blocks)}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    new = after.keys() - before.keys()
    assert new == (
        {"pooler.dense.weight", "pooler.dense.bias"} if kind in ("vit-masked", "vit-own", "deit-own") else set()
    )
    if kind in ("clip", "siglip"):
        assert any(name.startswith("text_model.") for name in before)
        assert stock.config.text_config.to_dict() == model.config.text_config.to_dict()
    assert all(torch.equal(value, dict(stock.named_buffers())[name]) for name, value in model.named_buffers())


def test_the_input_model_is_not_changed(kind, model):
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    stock = convert_to_stock(model, TWO_FOLDS, random_maps(TWO_FOLDS))
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(1.0)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.config.to_dict() == config


def test_nothing_is_drawn(model):
    state = torch.get_rng_state()
    convert_to_stock(model, TWO_FOLDS, random_maps(TWO_FOLDS))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith(("classifier", "teacher"))])
def test_labels_survive(kind, tmp_path):
    convert_to_stock(make_model(kind), TWO_FOLDS, random_maps(TWO_FOLDS)).save_pretrained(tmp_path)
    config = load(kind, tmp_path).config
    assert config.id2label == LABELS and config.label2id == {name: index for index, name in LABELS.items()}


def test_identity_deletes_blocks(kind, model, images):
    """As taking them out of the list of blocks by hand."""
    plan = CompressionPlan(DEPTH, (Span(0, 1, "identity"), Span(3, 5, "identity")))
    stock = convert_to_stock(model, plan, {})
    by_hand = copy.deepcopy(model)
    layers = adapter_for(by_hand).layers
    for b in (4, 3, 0):
        del layers[b]
    assert torch.equal(output(stock, images), output(by_hand, images))


def test_compressing_twice_works(kind, model, images):
    first = CompressionPlan(DEPTH, (Span(2, 4),))
    once = convert_to_stock(model, first, random_maps(first))
    second = CompressionPlan(4, (Span(2, 3),))  # into the MLP that has been folded into
    again = CompressionPlan(4, (Span(1, 2, "identity"), Span(3, 4)))
    for plan in (second, again):
        maps = random_maps(plan)
        expected = replay_output(adapter_for(once), plan, maps, images)
        twice = convert_to_stock(once, plan, maps)
        torch.testing.assert_close(output(twice, images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["vit-classifier", "dinov2", "dinov3_vit", "clip", "siglip", "vit-own"])
def test_precision_survives(kind, dtype, tmp_path):
    model = make_model(kind).to(dtype)
    stock = convert_to_stock(model, TWO_FOLDS, random_maps(TWO_FOLDS))
    assert {parameter.dtype for parameter in stock.parameters()} == {dtype}
    stock.save_pretrained(tmp_path)
    loaded = load(kind, tmp_path)
    assert loaded.dtype == dtype
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in stock.state_dict().items())


def test_a_fold_in_low_precision_is_rounded_once():
    """The product is taken in fp64: the folded layer is the exact one, rounded to bf16."""
    plan = CompressionPlan(DEPTH, (Span(2, 4),))
    maps = random_maps(plan)
    model = make_model("dinov2").to(torch.bfloat16)
    block = adapter_for(model).layers[1]
    fold, scale = maps[plan.spans[0]], block.layer_scale2.lambda1.double()
    matrix, offset = fold.weight.double(), fold.bias.double()
    weight = (matrix.T @ torch.diag(scale) @ block.mlp.fc2.weight.double()).bfloat16()
    bias = ((block.mlp.fc2.bias.double() * scale) @ matrix + offset).bfloat16()
    folded = adapter_for(convert_to_stock(model, plan, maps)).layers[1]
    torch.testing.assert_close(folded.mlp.fc2.weight, weight, rtol=1e-2, atol=1e-6)
    assert (folded.mlp.fc2.weight == weight).float().mean() > 0.999
    torch.testing.assert_close(folded.mlp.fc2.bias, bias, rtol=1e-2, atol=1e-6)
    assert torch.equal(folded.layer_scale2.lambda1, torch.ones(WIDTH, dtype=torch.bfloat16))
    assert torch.equal(folded.layer_scale1.lambda1, block.layer_scale1.lambda1)


@torch.no_grad()
def test_a_layer_without_bias_takes_a_fold_without_one():
    layer = nn.Linear(10, WIDTH, bias=False)
    x, matrix = torch.randn(5, 10), torch.randn(WIDTH, WIDTH)
    expected = layer(x) @ matrix
    with pytest.raises(InputError, match="bias=False"):
        fold_into(layer, AffineMap(matrix, torch.ones(WIDTH)))
    fold_into(layer, AffineMap(matrix, torch.zeros(WIDTH)))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", ["vit-classifier", "dinov2", "clip", "deit-own"])
def test_the_attention_implementation_survives(kind):
    model = make_model(kind)
    model.set_attn_implementation("eager")
    stock = convert_to_stock(model, TWO_FOLDS, random_maps(TWO_FOLDS))
    assert adapter_for(stock).tower.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("kind", "backbone_class"),
    [
        ("dinov2", transformers.Dinov2Backbone),
        ("dinov2_with_registers", transformers.Dinov2WithRegistersBackbone),
        ("dinov3_vit", transformers.DINOv3ViTBackbone),
    ],
)
def test_the_folder_of_a_shorter_dino_loads_as_a_backbone(kind, backbone_class, images, tmp_path):
    """Its configuration names the stages, which are as many as the blocks."""
    convert_to_stock(make_model(kind), TWO_FOLDS, random_maps(TWO_FOLDS)).save_pretrained(tmp_path)
    backbone = backbone_class.from_pretrained(tmp_path).eval()
    assert backbone.stage_names == ["stem", "stage1", "stage2", "stage3"]
    with torch.no_grad():
        (features,) = backbone(images).feature_maps
    assert features.shape == (3, WIDTH, 4, 4)


@pytest.mark.parametrize(
    "plan",
    [
        CompressionPlan(DEPTH, (Span(1, 2, "linear"),)),
        CompressionPlan(DEPTH, (Span(1, 2),), (Half(3, "mlp", "const"),)),
    ],
)
def test_a_plan_with_maps_is_refused(plan):
    model = make_model("clip")
    assert not fits_stock(adapter_for(model), plan)
    with pytest.raises(InputError, match="no stock clip has.*fold and identity") as caught:
        convert_to_stock(model, plan, random_maps(plan))
    assert "\n" not in str(caught.value)


def test_a_plan_for_another_depth_is_refused():
    with pytest.raises(InputError, match="depth"):
        convert_to_stock(make_model("vit"), CompressionPlan(DEPTH - 1, (Span(1, 2),)), {})


def test_a_model_with_maps_is_stock_again_once_they_are_removed(images, tmp_path):
    config = make_model("vit-own-classifier").config.to_dict()
    block_maps = {"2": {"kind": "linear"}, "4": {"kind": "block", "attention": "const", "mlp": "full"}}
    torch.manual_seed(0)
    model = models.SimPruneViTForImageClassification(
        models.SimPruneViTConfig.from_dict({**config, "block_maps": block_maps})
    ).eval()
    all_of_them = CompressionPlan(DEPTH, (Span(2, 5),))
    one = CompressionPlan(DEPTH, (Span(2, 3, "identity"),))
    assert fits_stock(adapter_for(model), all_of_them) and not fits_stock(adapter_for(model), one)
    with pytest.raises(InputError, match="holds maps"):
        convert_to_stock(model, one, {})
    maps = random_maps(all_of_them)
    convert_to_stock(model, all_of_them, maps).save_pretrained(tmp_path)
    stock = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(stock) is transformers.ViTForImageClassification and stock.config.id2label == LABELS
    torch.testing.assert_close(
        output(stock, images), replay_output(adapter_for(model), all_of_them, maps, images), rtol=1e-5, atol=1e-5
    )
