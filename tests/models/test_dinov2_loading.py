"""`from_pretrained` of DINOv2: every weight of a stock or own checkpoint, or an error that says which is missing.

What is imported are the promises of all families, asked of this one.
"""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification

from .conftest import VIT
from .dinov2_family import DINOV2, Dinov2Family
from .test_loading import (  # noqa: F401
    assert_same_weights,
    test_a_configuration_can_be_given,
    test_a_weight_of_another_size_is_an_error,
    test_a_weights_folder_loads_with_a_given_configuration,
    test_an_unknown_argument_is_an_error_as_in_transformers,
    test_precision_is_chosen_as_in_transformers,
    test_revisions_of_a_cached_repository_are_followed,
    test_subfolders_and_names_are_followed,
    test_token_and_revision_reach_the_requests_for_configuration_and_weights,
)


# (name in transformers 5, name in transformers 4) within a block
OLD_NAMES = (
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
    ("mlp.down_proj", "mlp.weights_out"),
)


@pytest.fixture
def family() -> Dinov2Family:
    return DINOV2


def as_version_4(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gate and input of a SwiGLU are one matrix there."""
    found = {}
    for name, value in weights.items():
        if "gate_proj" in name:
            found[name.replace("gate_proj", "weights_in")] = torch.cat(
                [value, weights[name.replace("gate_proj", "up_proj")]]
            )
        elif "up_proj" not in name:
            for new, old in OLD_NAMES:
                name = name.replace(f".{new}.", f".{old}.")
            found[name] = value
    return found


def write_checkpoint(folder: Path, network, names: str = "new", shards: int = 1, drop: str | None = None) -> Path:
    """A checkpoint folder written without transformers' own renaming: the names are exactly those asked for."""
    network.config.save_pretrained(folder)
    weights = {k: v.clone() for k, v in network.state_dict().items() if k != drop}
    if names == "old":
        weights = as_version_4(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder
    index = {}
    for shard in range(shards):
        part = {key: weights[key] for key in sorted(weights)[shard::shards]}
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(part, file))
    total = sum(value.nbytes for value in weights.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("names", ["old", "new"])
@pytest.mark.parametrize("kind", ["model", "classifier"])
@pytest.mark.parametrize("swiglu", [False, True])
def test_every_weight_of_a_stock_checkpoint_arrives(tmp_path, names: str, shards: int, kind: str, swiglu: bool):
    stock = DINOV2.stock(kind, use_swiglu_ffn=swiglu)
    write_checkpoint(tmp_path, stock, names, shards)
    own_class = DINOV2.model if kind == "model" else DINOV2.classifier
    own, info = own_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert own.state_dict().keys() == stock.state_dict().keys()
    assert any(name.endswith("layer_scale1.lambda1") for name in own.state_dict())
    assert_same_weights(own, stock)
    assert not own.training


@pytest.mark.parametrize("names", ["old", "new"])
def test_a_classifier_checkpoint_loads_into_the_model(tmp_path, names: str):
    stock = DINOV2.stock("classifier")
    write_checkpoint(tmp_path, stock, names)
    own, info = DINOV2.model.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert_same_weights(own, stock, prefix="dinov2.")


@pytest.mark.parametrize("names", ["old", "new"])
def test_a_model_checkpoint_loads_into_the_classifier(tmp_path, names: str, caplog):
    stock = DINOV2.stock()
    write_checkpoint(tmp_path, stock, names)
    with caplog.at_level(logging.WARNING):
        own, info = DINOV2.classifier.from_pretrained(tmp_path, num_labels=7, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert "newly initialised: classifier.bias, classifier.weight" in caplog.text
    assert own.classifier.weight.shape == (7, 48)
    assert_same_weights(own.dinov2, stock)


@pytest.mark.parametrize(
    "lost",
    [
        "encoder.layer.1.attention.k_proj.weight",
        "encoder.layer.2.mlp.fc2.bias",
        "encoder.layer.0.layer_scale2.lambda1",
        "layernorm.weight",
        "embeddings.cls_token",
        "embeddings.mask_token",
        "embeddings.position_embeddings",
    ],
)
@pytest.mark.parametrize("origin", ["old", "new", "own"])
def test_a_missing_weight_is_an_error(tmp_path, origin: str, lost: str):
    network = DINOV2.own() if origin == "own" else DINOV2.stock()
    write_checkpoint(tmp_path, network, "old" if origin == "old" else "new", drop=lost)
    with pytest.raises(ValueError, match=rf"weights missing in .*: {lost}$"):
        DINOV2.model.from_pretrained(tmp_path)


def test_a_checkpoint_without_a_mask_token_loads_where_none_is_asked_for(tmp_path, images: Tensor):
    stock = DINOV2.stock()
    write_checkpoint(tmp_path, stock, drop="embeddings.mask_token")
    own = DINOV2.model.from_pretrained(tmp_path, use_mask_token=False)
    assert own.embeddings.mask_token is None
    assert torch.equal(own(images).last_hidden_state, stock(images).last_hidden_state)


@pytest.mark.parametrize("names", ["old", "new"])
def test_blocks_that_the_configuration_does_not_know_are_an_error_unless_asked_away(tmp_path, names: str):
    stock = DINOV2.stock()
    write_checkpoint(tmp_path, stock, names)
    short = DINOV2.model.from_pretrained(tmp_path, num_hidden_layers=2)
    assert len(short.layers) == 2
    assert_same_weights(short, stock)
    content = json.loads((tmp_path / "config.json").read_text())
    stages = {"stage_names": ["stem", "stage1", "stage2"], "out_features": ["stage2"], "out_indices": [2]}
    (tmp_path / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 2, **stages}))
    with pytest.raises(ValueError, match=r"weights left out in .*encoder\.layer\.2"):
        DINOV2.model.from_pretrained(tmp_path)


def test_a_shortened_network_is_saved_and_loads_again(tmp_path, images: Tensor):
    """Of a stock configuration the names of stages would not fit any more."""
    write_checkpoint(tmp_path / "whole", DINOV2.stock())
    short = DINOV2.model.from_pretrained(tmp_path / "whole", num_hidden_layers=2)
    short.save_pretrained(tmp_path / "short")
    again = AutoModel.from_pretrained(tmp_path / "short")
    assert torch.equal(again(images).last_hidden_state, short(images).last_hidden_state)
    assert "stage_names" not in json.loads((tmp_path / "short" / "config.json").read_text())


@pytest.mark.parametrize("mine", [DINOV2, VIT], ids=["vit-into-dinov2", "dinov2-into-vit"])
@pytest.mark.parametrize("origin", ["stock", "own"])
def test_a_checkpoint_of_another_family_is_an_error(tmp_path, mine, origin: str):
    other = VIT if mine is DINOV2 else DINOV2
    write_checkpoint(tmp_path, getattr(other, origin)())
    with pytest.raises(ValueError, match=f"{mine.model.__name__} loads '{mine.name}' and 'simprune_{mine.name}'"):
        mine.model.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"takes '{mine.name}' and 'simprune_{mine.name}'"):
        mine.config.from_pretrained(tmp_path)


def test_the_defaults_of_the_stock_configuration_hold(tmp_path):
    stock = DINOV2.stock()
    write_checkpoint(tmp_path, stock)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["layerscale_value"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert DINOV2.config.from_pretrained(tmp_path).layerscale_value == 1.0
    assert DINOV2.config().layerscale_value == 1e-5


def test_configuration_settings_can_be_overridden(tmp_path):
    write_checkpoint(tmp_path, DINOV2.stock("classifier", drop_path_rate=0.3))
    names = {0: "cat", 1: "dog"}
    own = DINOV2.classifier.from_pretrained(tmp_path, drop_path_rate=0.2, id2label=names)
    assert own.config.drop_path_rate == own.base_model.layers[-1].drop_path_rate == 0.2
    assert own.config.id2label == names
    assert DINOV2.model.from_pretrained(tmp_path).layers[-1].drop_path_rate == 0.3


def test_a_classifier_of_another_size_needs_permission(tmp_path, caplog):
    stock = DINOV2.stock("classifier", num_labels=5)
    write_checkpoint(tmp_path, stock)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        DINOV2.classifier.from_pretrained(tmp_path, num_labels=3)
    with caplog.at_level(logging.WARNING):
        own = DINOV2.classifier.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert "newly initialised: classifier.bias, classifier.weight" in caplog.text
    assert own.classifier.weight.shape == (3, 48)
    assert_same_weights(own.dinov2, stock.dinov2)


def test_device_maps_are_honoured(tmp_path, images: Tensor):
    pytest.importorskip("accelerate")
    stock = DINOV2.stock()
    write_checkpoint(tmp_path / "model", stock, "old")
    places = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "encoder.layer.2": "cpu"}
    places["layernorm"] = "cpu"
    own = DINOV2.model.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off")
    assert own.layers[1].mlp.fc1.weight.device.type == "meta"
    assert torch.equal(own(images).last_hidden_state, stock(images).last_hidden_state)


@pytest.mark.parametrize("kind", ["model", "classifier"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_an_own_folder_comes_back_to_the_bit(tmp_path, images: Tensor, kind: str, precision: torch.dtype):
    own = DINOV2.own(kind, drop_path_rate=0.2, use_swiglu_ffn=True).to(precision)
    own.save_pretrained(tmp_path)
    auto = AutoModel if kind == "model" else AutoModelForImageClassification
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(own) and not any(info.values())
    assert again.config.drop_path_rate == 0.2 and again.dtype == precision
    assert torch.equal(again(images)[0], own(images)[0])


def test_a_state_dict_must_be_complete():
    network = DINOV2.own()
    weights = network.state_dict()
    own = DINOV2.model.from_pretrained(None, config=network.config, state_dict=dict(weights))
    assert_same_weights(own, network)
    del weights["encoder.layer.1.mlp.fc1.bias"]
    with pytest.raises(ValueError, match="weights missing"):
        DINOV2.model.from_pretrained(None, config=network.config, state_dict=weights)
