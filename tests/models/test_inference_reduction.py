"""Token reduction by configuration: on any checkpoint, saved and loaded, exported, and what is refused."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification, ViTImageProcessorPil, pipeline

from hf_simprune.errors import InputError
from hf_simprune.models.stock import to_stock
from hf_simprune.reduction import BranchWalk

from .conftest import DEIT, TINY, VIT, Family, randomise
from .test_real_weights import real_images


METHODS = ("evit", "tome", "mctf", "expedit")
# Of 16 patch tokens, at keep rate 0.5 and layers 0 and 1 of 3.
COUNTS = {
    "evit": [16, 9, 6, 6],  # with the fused token, which counts at the next stage: ceil(0.5 * 9) + 1
    "tome": [16, 8, 4, 4],
    "mctf": [16, 8, 4, 4],
    "expedit": [16, 9, 4, 4],  # ceil(sqrt(0.5) * 4) = 3 rows and columns, then sqrt(0.25) * 4 = 2
}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def reduced(family: Family, method: str, kind: str = "model", **settings):
    """A random network with token reduction at blocks 0 and 1."""
    values = {"token_reduction": method, "keep_rate": 0.5, "reduction_layers": [0, 1], **settings}
    torch.manual_seed(0)
    config = family.config(**{**TINY, **values})
    return randomise(
        family.classifier(config) if kind == "classifier" else family.model(config, add_pooling_layer=False)
    )


def same_tensors(got, expected) -> None:
    for one, other in zip(got.to_tuple(), expected.to_tuple(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["model", "classifier"])
def test_keep_rate_one_computes_what_the_stock_network_computes(
    family: Family, method: str, kind: str, tmp_path, images: Tensor
):
    stock = family.stock(kind)
    stock.save_pretrained(tmp_path)
    loaded = (family.model if kind == "model" else family.classifier).from_pretrained(
        tmp_path, token_reduction=method, keep_rate=1.0
    )
    for got, expected in zip(loaded(images).to_tuple(), stock(images).to_tuple(), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_stock_checkpoint_loads_with_a_method_by_class_and_by_auto_class(
    family: Family, method: str, tmp_path, images: Tensor
):
    stock = family.stock("classifier")
    stock.save_pretrained(tmp_path)
    settings = {"token_reduction": method, "keep_rate": 0.5, "reduction_layers": [0, 1]}
    loaded, info = family.classifier.from_pretrained(tmp_path, output_loading_info=True, **settings)
    assert not any(info.values())
    config = family.config.from_pretrained(tmp_path, **settings)
    by_auto = AutoModelForImageClassification.from_pretrained(tmp_path, config=config)
    assert type(by_auto) is family.classifier
    same_tensors(by_auto(images), loaded(images))
    assert not torch.allclose(loaded(images).logits, stock(images).logits, atol=1e-4)
    tokens = loaded.base_model.embed(images)
    walk = BranchWalk(loaded.base_model.reducer, family.num_prefix, (4, 4))
    for index, layer in enumerate(loaded.base_model.layers):
        tokens = walk.block(index, layer, tokens)
    assert torch.equal(loaded.classifier(loaded.base_model.layernorm(tokens)[:, 0]), loaded(images).logits)


def test_an_own_checkpoint_takes_a_method_and_gives_it_up(family: Family, method: str, tmp_path, images: Tensor):
    own = family.own()
    own.save_pretrained(tmp_path / "dense")
    settings = {"token_reduction": method, "keep_rate": 0.5, "reduction_layers": [0, 1]}
    loaded = AutoModel.from_pretrained(tmp_path / "dense", add_pooling_layer=False, **settings)
    assert loaded(images).last_hidden_state.shape[1] == COUNTS[method][-1] + family.num_prefix
    loaded.save_pretrained(tmp_path / "reduced")
    assert settings.items() <= json.loads((tmp_path / "reduced" / "config.json").read_text()).items()
    again = AutoModel.from_pretrained(tmp_path / "reduced", add_pooling_layer=False)
    same_tensors(again(images), loaded(images))
    off = {"token_reduction": None, "keep_rate": 1.0, "reduction_layers": None}
    dense = AutoModel.from_pretrained(tmp_path / "reduced", add_pooling_layer=False, **off)
    same_tensors(dense(images), own(images))


@pytest.mark.parametrize("kind", ["model", "classifier"])
def test_a_saved_folder_comes_back_to_the_bit(family: Family, method: str, kind: str, tmp_path, images: Tensor):
    options = {"proportional": False} if method in ("tome", "mctf") else None
    model = reduced(family, method, kind, restore_tokens=True, reduction_options=options)
    model.save_pretrained(tmp_path)
    arguments = {"add_pooling_layer": False} if kind == "model" else {}
    again = type(model).from_pretrained(tmp_path, **arguments)
    assert again.config.restore_tokens and (again.config.reduction_options or None) == options
    same_tensors(again(images), model(images))


def test_hidden_states_shrink_as_the_method_says(family: Family, method: str, images: Tensor):
    model = reduced(family, method)
    output = model(images, output_hidden_states=True)
    counts = [state.shape[1] - family.num_prefix for state in output.hidden_states]
    assert counts == COUNTS[method]
    assert torch.equal(output.hidden_states[0], model.embed(images))
    assert torch.equal(model.layernorm(output.hidden_states[-1]), output.last_hidden_state)
    assert model.reducer.counts((4, 4)) == COUNTS[method][:3]
    last = model(images, output_hidden_states=[-1]).hidden_states
    assert torch.equal(last[-1], output.hidden_states[-1])


def test_attention_weights_are_recorded_for_every_block(family: Family, method: str, images: Tensor):
    model = reduced(family, method)
    model.set_attn_implementation("eager")
    output = model(images, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 3
    lengths = [state.shape[1] for state in output.hidden_states]
    assert [weights.shape for weights in output.attentions] == [(4, 3, length, length) for length in lengths[:3]]
    torch.testing.assert_close(output.last_hidden_state, model(images).last_hidden_state)


def test_all_tokens_can_be_had_back_in_their_places(family: Family, method: str, images: Tensor):
    model, small = reduced(family, method, restore_tokens=True), reduced(family, method)
    restored, few = (net(images).last_hidden_state for net in (model, small))
    prefix = family.num_prefix
    assert restored.shape == (4, prefix + 16, 24)
    assert torch.equal(restored[:, :prefix], few[:, :prefix])
    walk = BranchWalk(small.reducer, prefix, (4, 4))
    tokens = small.embed(images)
    entered = []  # the tokens before every stage, where they leave
    for index, layer in enumerate(small.layers):
        if index in small.reducer.layers and small.reducer.site == "middle":
            entered.append(layer(tokens, walk.key_bias(tokens), half="attention"))
        else:
            entered.append(None)
        tokens = walk.block(index, layer, tokens)
    if method == "expedit":  # mixes have their own test
        return
    for row in range(4):
        expected = tokens[row, prefix:]
        for stage in (1, 0):
            groups = walk.maps[stage].groups()[row].tolist()
            expected = torch.stack(
                [expected[g] if g >= 0 else entered[stage][row, prefix + i] for i, g in enumerate(groups)]
            )
        torch.testing.assert_close(restored[row, prefix:], model.layernorm(expected), atol=1e-5, rtol=1e-5)


def test_expedits_own_schedule_restores_inside_the_network(family: Family, images: Tensor):
    options = {"schedule": "published", "grid": 2, "cluster_after": 0, "restore_after": 1}
    model = reduced(family, "expedit", reduction_options=options)
    output = model(images, output_hidden_states=True)
    assert [state.shape[1] - family.num_prefix for state in output.hidden_states] == [16, 4, 4, 16]
    assert output.last_hidden_state.shape[1] == 16 + family.num_prefix


def test_every_layer_merging_is_followed(family: Family, images: Tensor):
    model = reduced(
        family, "tome", keep_rate=1.0, reduction_options={"schedule": "every_layer", "r": 3}, restore_tokens=True
    )
    output = model(images, output_hidden_states=True)
    assert [state.shape[1] - family.num_prefix for state in output.hidden_states] == [16, 13, 10, 7]
    assert output.last_hidden_state.shape[1] == 16 + family.num_prefix


@pytest.mark.parametrize("size", [(24, 40), (16, 16)])
def test_other_sizes_keep_their_own_grid(family: Family, method: str, size: tuple[int, int]):
    model = reduced(family, method, restore_tokens=True)
    crops = torch.randn(2, 3, *size)
    output = model(crops, interpolate_pos_encoding=True, output_hidden_states=True)
    rows, columns = size[0] // 8, size[1] // 8
    assert output.last_hidden_state.shape[1] == rows * columns + family.num_prefix
    counts = [state.shape[1] - family.num_prefix for state in output.hidden_states]
    assert counts[:3] == model.reducer.counts((rows, columns))
    if method == "expedit":
        assert counts[1] == math.ceil(0.5**0.5 * rows) * math.ceil(0.5**0.5 * columns)
    with pytest.raises(ValueError, match="doesn't match model"):
        model(crops)


def test_the_network_can_be_exported(method: str, images: Tensor):
    """For the batch it is shown."""
    model = reduced(VIT, method, "classifier")
    exported = torch.export.export(model, (images,)).module()
    other = torch.randn_like(images)
    torch.testing.assert_close(exported(other).logits, model(other).logits)


def test_the_network_can_be_exported_for_any_batch(method: str, images: Tensor):
    model = reduced(DEIT, method, restore_tokens=True)
    any_batch = {"pixel_values": {0: torch.export.Dim("batch", min=2, max=64)}}
    exported = torch.export.export(model, (images,), dynamic_shapes=any_batch).module()
    other = torch.randn(7, 3, 32, 32)
    assert exported(other).last_hidden_state.shape == (7, 18, 24)
    torch.testing.assert_close(exported(other).last_hidden_state, model(other).last_hidden_state)


def test_the_network_can_be_compiled(method: str, images: Tensor):
    torch._dynamo.reset()
    model = reduced(VIT, method, "classifier", restore_tokens=True)
    expected = model(images).logits
    torch.testing.assert_close(torch.compile(model, backend="eager")(images).logits, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_fine_tuning_with_gradient_checkpointing(family: Family, method: str, images: Tensor, use_reentrant: bool):
    plain = reduced(family, method, "classifier", drop_path_rate=0.3, restore_tokens=not use_reentrant).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for model in (plain, checkpointed):
        torch.manual_seed(8)
        output = model(images, labels=torch.tensor([0, 1, 1, 0]))
        output.loss.backward()
    for (name, got), expected in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=name)
        assert expected.grad is not None and expected.grad.isfinite().all()


def test_half_precision(family: Family, method: str, tmp_path, images: Tensor):
    stock = family.stock("classifier")
    stock.save_pretrained(tmp_path)
    settings = {"token_reduction": method, "keep_rate": 0.75, "dtype": torch.bfloat16}
    model = family.classifier.from_pretrained(tmp_path, **settings)
    logits = model(images).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert model.base_model(images).last_hidden_state.dtype == torch.bfloat16


def test_the_pipeline_takes_it(family: Family, method: str, tmp_path):
    model = reduced(family, method, "classifier", id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    pixels = classify.image_processor(image, return_tensors="pt").pixel_values
    expected = model(pixels).logits[0].softmax(-1).tolist()
    found = {entry["label"]: entry["score"] for entry in classify(image)}
    assert found == pytest.approx(dict(zip(("cat", "dog"), expected, strict=True)), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_reduction": "random"}, "token_reduction 'random' is not for inference: choose one of evit, expedit"),
        ({"token_reduction": "simprune"}, "token_reduction 'simprune' is not for inference.*mctf, tome"),
        ({"token_reduction": "tomme"}, "token_reduction 'tomme' is not for inference"),
        ({"token_reduction": "evit", "reduction_options": {"fused": True}}, "fused is unknown to evit: fuse"),
        ({"token_reduction": "evit", "reduction_options": {"fuse": "no"}}, "fuse 'no' of evit must be of type bool"),
        ({"token_reduction": "evit", "reduction_options": {"fuse": 1}}, "fuse 1 of evit must be of type bool"),
        ({"token_reduction": "expedit", "reduction_options": {"iterations": True}}, "iterations True .* type int"),
        ({"token_reduction": "expedit", "reduction_options": {"grid": 1.5}}, "grid 1.5 .* of type int or None"),
        ({"token_reduction": "evit", "keep_rate": 0.0}, "keep_rate 0.0 is out of range"),
        ({"token_reduction": "evit", "keep_rate": 1.1}, "keep_rate 1.1 is out of range"),
        ({"token_reduction": "tome", "keep_rate": 0.4}, "keep_rate 0.4.*tome"),
        ({"token_reduction": "mctf", "keep_rate": 0.4}, "keep_rate 0.4.*mctf"),
        (
            {"token_reduction": "expedit", "reduction_options": {"schedule": "published", "grid": 5}},
            "grid 5: the token grid has 4 patches a side",
        ),
        (
            {"token_reduction": "tome", "reduction_layers": [1, 3]},
            "reduction_layers contains 3: .*3 blocks has 0 to 2",
        ),
        ({"token_reduction": "tome", "reduction_layers": [-1]}, "reduction_layers contains -1"),
        ({"token_reduction": "tome", "reduction_layers": [1, 1]}, r"reduction_layers repeats \[1\]"),
        ({"keep_rate": 0.7}, "keep_rate 0.7 without token_reduction: name a method"),
        ({"reduction_layers": [1]}, r"reduction_layers \[1\] without token_reduction"),
        ({"reduction_options": {"fuse": True}}, "reduction_options .* without token_reduction"),
        ({"token_reduction": "evit", "block_maps": {"1": {"kind": "linear"}}}, "reduction layer 1: .* has no halves"),
        (
            {"token_reduction": "tome", "block_maps": {"1": {"kind": "block", "attention": "const", "mlp": "full"}}},
            "reduction layer 1: block_maps replaces its attention, which tome needs",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_when_the_network_is_built(
    family: Family, settings: dict, message: str
):
    config = family.config(**{**TINY, **settings})
    for build in (family.model, family.classifier):
        with pytest.raises(ValueError, match=message) as caught:
            build(config)
        assert "\n" not in str(caught.value)


def test_settings_are_refused_before_weights_are_read(family: Family, tmp_path):
    family.stock("classifier").save_pretrained(tmp_path)
    settings = {"token_reduction": "tome", "restore_tokens": True}  # the classifier of DINOv2 takes no other
    with pytest.raises(TypeError, match="keep_rat"):
        family.classifier.from_pretrained(tmp_path, **settings, keep_rat=0.6)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="keep_rate 0.4.*tome"):
        family.classifier.from_pretrained(tmp_path, **settings, keep_rate=0.4)
    with pytest.raises(StrictDataclassError, match="keep_rate"):
        family.classifier.from_pretrained(tmp_path, **settings, keep_rate="half")


def test_maps_elsewhere_and_replaced_mlps_are_no_hindrance(family: Family, images: Tensor):
    maps = {"0": {"kind": "linear"}, "1": {"kind": "block", "attention": "full", "mlp": "linear"}}
    model = reduced(family, "tome", reduction_layers=[1], block_maps=maps)
    assert model(images).last_hidden_state.shape[1] == 8 + family.num_prefix
    model = reduced(family, "tome", reduction_layers=[1], block_maps={"2": {"kind": "linear"}})  # a bias meets a map
    assert model(images).last_hidden_state.shape[1] == 8 + family.num_prefix


def test_an_attention_mask_is_refused(family: Family, images: Tensor):
    with pytest.raises(ValueError, match="token_reduction tome takes no attention_mask"):
        reduced(family, "tome")(images, attention_mask=torch.ones(4, 16 + family.num_prefix))


def test_a_reduced_network_is_no_stock_network(family: Family, method: str):
    model = reduced(family, method)
    with pytest.raises(
        InputError, match=f"to_stock: token_reduction {method}: '{family.name}' has none; .*save_with_code"
    ):
        to_stock(model)
    with pytest.raises(ValueError, match=f"token_reduction {method}"):
        model.config.to_stock()
    values = model.config.to_stock(ignore_reduction=True).to_dict()
    own = {"token_reduction", "keep_rate", "reduction_layers", "reduction_options", "restore_tokens", "block_maps"}
    assert not own & values.keys()


def test_a_network_without_reduction_says_nothing_about_it(family: Family, tmp_path):
    family.own().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "token_reduction" not in written or written["token_reduction"] is None


def test_the_real_network_is_the_stock_one_at_keep_rate_one(shared_data: Path, method: str):
    folder = shared_data / "deit_tiny_patch16_224"
    batch = real_images(shared_data, 8)
    stock = VIT.stock_classifier.from_pretrained(folder)
    with torch.inference_mode():
        expected = stock(batch).logits
        got = VIT.classifier.from_pretrained(folder, token_reduction=method, keep_rate=1.0)(batch).logits
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
        fewer = VIT.classifier.from_pretrained(folder, token_reduction=method, keep_rate=0.7, restore_tokens=True)
        agreement = (fewer(batch).logits.argmax(-1) == expected.argmax(-1)).float().mean().item()
        print(f"{method}: {agreement:.0%} of 8 images classified as by the whole network at keep rate 0.7")
        assert agreement >= 0.6  # of a thousand classes
        assert fewer.base_model(batch).last_hidden_state.shape == (8, 197, 192)
