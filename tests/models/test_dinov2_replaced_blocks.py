"""Maps in the place of blocks and halves of DINOv2. What is imported are the promises of all families."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from .conftest import TINY
from .dinov2_family import DINOV2, Dinov2Family, randomise
from .test_replaced_blocks import (  # noqa: F401
    EVERY_MAP,
    WIDTH,
    build,
    naive_block,
    rewrite,
    test_a_map_has_no_halves,
    test_a_network_without_maps_says_nothing_about_them,
    test_a_saved_folder_comes_back_to_the_bit,
    test_a_stock_checkpoint_cannot_be_given_maps_on_the_way,
    test_a_truncated_file_is_an_error,
    test_a_wrong_entry_is_an_error_that_names_it,
    test_fewer_blocks_can_be_asked_for_only_where_no_map_is_lost,
    test_halves_of_a_block_with_maps_compose_to_it,
    test_no_stock_copy_is_made_of_a_model_with_maps,
    test_stochastic_depth_skips_a_replaced_half_for_whole_samples,
    test_the_forward_can_be_exported,
)


@pytest.fixture
def family() -> Dinov2Family:
    return DINOV2


def unscaled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A block's weights by the names of a ViT, LayerScale multiplied into the last layer of each half."""
    found = {name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after"): value
             for name, value in weights.items()}  # fmt: skip
    for scale, layer in (("layer_scale1", "attention.o_proj"), ("layer_scale2", "mlp.fc2")):
        gain = found.pop(f"{scale}.lambda1", None)
        if gain is not None:
            found[f"{layer}.weight"] = gain[:, None] * found[f"{layer}.weight"]
            found[f"{layer}.bias"] = gain * found[f"{layer}.bias"]
    return found


def test_every_map_computes_what_it_says(images: Tensor):
    model = randomise(build(DINOV2)).double()
    tokens = model.embed(images)
    recorded = model(images, output_hidden_states=True).hidden_states
    assert len(recorded) == model.config.num_hidden_layers + 1 == 9
    torch.testing.assert_close(recorded[0], tokens)
    for index, layer in enumerate(model.layers):
        tokens = naive_block(unscaled(dict(layer.state_dict())), tokens, EVERY_MAP.get(str(index)))
        torch.testing.assert_close(recorded[index + 1], tokens, msg=f"block {index}")
    torch.testing.assert_close(model(images).last_hidden_state, model.layernorm(tokens))


def test_a_replaced_half_costs_no_more_than_its_map():
    """Neither LayerScale, which the map has taken in, nor a norm that a constant does not read."""
    tokens = torch.randn(1, 17, WIDTH)
    for half, norm, scale in (("attention", "norm1", "layer_scale1"), ("mlp", "norm2", "layer_scale2")):
        for kind, flops, parameters in (("linear", 2 * 17 * WIDTH**2, WIDTH**2 + WIDTH), ("const", 0, WIDTH)):
            spec = {"kind": "block", "attention": "full", "mlp": "full", half: kind}
            layer = build(DINOV2, {"0": spec}).layers[0]
            with FlopCounterMode(display=False) as counter:
                layer(tokens, half=half)
            assert counter.get_total_flops() == flops, (half, kind)
            assert sum(p.numel() for p in getattr(layer, half).parameters()) == parameters
            assert isinstance(getattr(layer, norm), nn.Identity) == (kind == "const")
            assert isinstance(getattr(layer, scale), nn.Identity)


def test_attention_weights_are_recorded_where_attention_is_left(images: Tensor):
    model = build(DINOV2)
    model.set_attn_implementation("eager")
    output = model(images, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 2  # of blocks 5 and 7
    whole = model.layers[7]
    assert torch.equal(output.attentions[1], whole.attention(whole.norm1(output.hidden_states[7]))[1])


def test_new_maps_start_as_dinos_layers_do():
    torch.manual_seed(0)
    model = DINOV2.model(DINOV2.config(**{**TINY, "num_hidden_layers": 8}, block_maps=EVERY_MAP))
    for name, parameter in model.layers.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "lambda1" in name:
            assert (parameter == 1e-5).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name


def test_blocks_go_to_the_devices_whole(tmp_path, images: Tensor):
    model = build(DINOV2)
    model.save_pretrained(tmp_path / "model")
    places = {"embeddings": "cpu", "layernorm": "cpu", **{f"encoder.layer.{index}": "cpu" for index in range(8)}}
    places["encoder.layer.1"] = places["encoder.layer.3"] = "disk"
    again = DINOV2.model.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off")
    torch.testing.assert_close(again(images).last_hidden_state, model(images).last_hidden_state)
    kinds = {type(layer).__name__ for layer in model.layers}
    assert len(kinds) == 2 and kinds <= set(model._no_split_modules)


@pytest.mark.parametrize(
    "name", ["0.attention.dense.weight", "1.map.dense.bias", "2.map.down.weight", "3.attention.bias", "5.mlp.bias"]
)
def test_a_missing_or_renamed_weight_is_an_error(tmp_path: Path, name: str):
    build(DINOV2).save_pretrained(tmp_path)
    original = (tmp_path / "model.safetensors").read_bytes()
    rewrite(tmp_path, lambda weights: weights.pop(f"encoder.layer.{name}"))
    with pytest.raises(ValueError, match=rf"weights missing in .*: encoder.layer.{name}$"):
        AutoModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(original)
    rewrite(tmp_path, lambda weights: weights.update({f"encoder.layer.{name}_2": torch.zeros(1)}))
    with pytest.raises(ValueError, match=rf"weights left out in .*: encoder.layer.{name}_2$"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "spec"),
    [
        ("1", None),  # a whole block where the file holds a map
        ("7", {"kind": "linear"}),  # and the other way round
        ("2", {"kind": "low_rank", "rank": 6}),
        ("3", {"kind": "block", "attention": "const", "mlp": "full"}),  # a half with its LayerScale
        ("0", {"kind": "block", "attention": "linear", "mlp": "linear"}),
    ],
)
def test_a_configuration_that_does_not_match_the_weights_is_an_error(tmp_path: Path, key: str, spec):
    build(DINOV2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["block_maps"][key] = spec
    if spec is None:
        del config["block_maps"][key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"encoder\.layer\.{key}\."):
        AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
