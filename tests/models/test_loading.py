"""`from_pretrained`: every weight of a stock or own checkpoint, or an error that says which is missing."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification

from .conftest import DEIT, VIT, Family


# (name in transformers 5, name in transformers 4) within a block
OLD_NAMES = (
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)


def old_name(name: str) -> str:
    name = name.replace("layers.", "encoder.layer.")
    for new, old in OLD_NAMES:
        name = name.replace(f".{new}.", f".{old}.")
    return name


def write_checkpoint(folder: Path, network, names: str = "new", shards: int = 1, drop: str | None = None) -> Path:
    """A checkpoint folder written without transformers' own renaming: the names are exactly those asked for."""
    network.config.save_pretrained(folder)
    weights = {k: v.clone() for k, v in network.state_dict().items() if drop is None or k != drop}
    if names == "old":
        weights = {old_name(key): value for key, value in weights.items()}
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


def assert_same_weights(own, stock, prefix: str = "") -> None:
    expected = stock.state_dict()
    got = own.state_dict()
    for name, value in got.items():
        assert torch.equal(value, expected[prefix + name]), name


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("names", ["old", "new"])
@pytest.mark.parametrize("kind", ["model", "classifier"])
def test_every_weight_of_a_stock_checkpoint_arrives(family: Family, tmp_path, names: str, shards: int, kind: str):
    stock = family.stock(kind)
    write_checkpoint(tmp_path, stock, names, shards)
    own_class = family.model if kind == "model" else family.classifier
    own, info = own_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert own.state_dict().keys() == stock.state_dict().keys()
    assert_same_weights(own, stock)
    assert not own.training


@pytest.mark.parametrize("names", ["old", "new"])
def test_a_classifier_checkpoint_loads_into_the_model(family: Family, tmp_path, names: str, caplog):
    stock = family.stock("classifier")
    write_checkpoint(tmp_path, stock, names)
    with caplog.at_level(logging.WARNING):
        own, info = family.model.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}
    assert "newly initialised: pooler.dense.bias, pooler.dense.weight" in caplog.text
    pooler_free = family.model.from_pretrained(tmp_path, add_pooling_layer=False)
    assert pooler_free.pooler is None
    assert_same_weights(pooler_free, stock, prefix=f"{family.name}.")
    del own.pooler
    assert_same_weights(own, stock, prefix=f"{family.name}.")


@pytest.mark.parametrize("names", ["old", "new"])
def test_a_model_checkpoint_loads_into_the_classifier(family: Family, tmp_path, names: str, caplog):
    stock = family.stock()
    write_checkpoint(tmp_path, stock, names)
    with caplog.at_level(logging.WARNING):
        own, info = family.classifier.from_pretrained(tmp_path, num_labels=7, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert "newly initialised: classifier.bias, classifier.weight" in caplog.text
    assert own.classifier.out_features == own.config.num_labels == 7
    assert_same_weights(getattr(own, family.name), stock)


@pytest.mark.parametrize(
    "lost",
    [
        "layers.1.attention.k_proj.weight",
        "layers.2.mlp.fc2.bias",
        "layernorm.weight",
        "embeddings.cls_token",
        "embeddings.position_embeddings",
    ],
)
@pytest.mark.parametrize("names", ["old", "new"])
def test_a_missing_weight_is_an_error(family: Family, tmp_path, names: str, lost: str):
    write_checkpoint(tmp_path, family.stock(), names, drop=lost)
    with pytest.raises(ValueError, match=rf"weights missing in .*: {lost}$"):
        family.model.from_pretrained(tmp_path)


def test_a_missing_weight_of_an_own_checkpoint_is_an_error(family: Family, tmp_path):
    write_checkpoint(tmp_path, family.own(), drop="layers.0.mlp.fc1.weight")
    for load in (family.model.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=r"weights missing in .*: layers\.0\.mlp\.fc1\.weight$"):
            load(tmp_path, add_pooling_layer=False)


def test_a_missing_distillation_token_is_an_error(tmp_path):
    write_checkpoint(tmp_path, DEIT.stock(), drop="embeddings.distillation_token")
    with pytest.raises(ValueError, match="embeddings.distillation_token"):
        DEIT.model.from_pretrained(tmp_path)


@pytest.mark.parametrize("names", ["old", "new"])
def test_blocks_that_the_configuration_does_not_know_are_an_error(family: Family, tmp_path, names: str):
    stock = family.stock()
    write_checkpoint(tmp_path, stock, names)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"weights left out in .*layer.*2"):
        family.model.from_pretrained(tmp_path)


@pytest.mark.parametrize("names", ["old", "new"])
def test_fewer_blocks_can_be_asked_for(family: Family, tmp_path, names: str):
    stock = family.stock()
    write_checkpoint(tmp_path, stock, names)
    own = family.model.from_pretrained(tmp_path, num_hidden_layers=2)
    assert len(own.layers) == 2
    assert_same_weights(own, stock)


def test_a_weight_of_another_size_is_an_error(family: Family, tmp_path):
    write_checkpoint(tmp_path, family.stock())
    with pytest.raises(ValueError, match=r"weights of another size in .*: embeddings\.position_embeddings$"):
        family.model.from_pretrained(tmp_path, image_size=64, ignore_mismatched_sizes=True)


def test_a_classifier_of_another_size_needs_permission(family: Family, tmp_path, caplog):
    stock = family.stock("classifier", num_labels=5)
    write_checkpoint(tmp_path, stock)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        family.classifier.from_pretrained(tmp_path, num_labels=3)
    with caplog.at_level(logging.WARNING):
        own, info = family.classifier.from_pretrained(
            tmp_path, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
        )
    assert {key[0] for key in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert "newly initialised: classifier.bias, classifier.weight" in caplog.text
    assert own.classifier.weight.shape == (3, 24)
    assert_same_weights(getattr(own, family.name), getattr(stock, family.name))


@pytest.mark.parametrize(("mine", "other"), [(VIT, DEIT), (DEIT, VIT)], ids=["deit-into-vit", "vit-into-deit"])
@pytest.mark.parametrize("origin", ["stock", "own"])
def test_a_checkpoint_of_the_other_family_is_an_error(tmp_path, mine: Family, other: Family, origin: str):
    write_checkpoint(tmp_path, getattr(other, origin)())
    with pytest.raises(ValueError, match=f"{mine.model.__name__} loads '{mine.name}' and 'simprune_{mine.name}'"):
        mine.model.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"takes '{mine.name}' and 'simprune_{mine.name}'"):
        mine.config.from_pretrained(tmp_path)


def test_the_defaults_of_the_stock_configuration_hold(family: Family, tmp_path, images: Tensor):
    stock = family.stock()
    write_checkpoint(tmp_path, stock)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["layer_norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    own = family.model.from_pretrained(tmp_path)
    assert own.config.layer_norm_eps == own.layers[0].layernorm_before.eps == 1e-12
    assert family.config.from_pretrained(tmp_path).layer_norm_eps == 1e-12
    assert torch.equal(own(images).last_hidden_state, stock(images).last_hidden_state)


def test_configuration_settings_can_be_overridden(family: Family, tmp_path):
    write_checkpoint(tmp_path, family.stock("classifier"))
    names = {0: "cat", 1: "dog"}
    own = family.classifier.from_pretrained(tmp_path, drop_path_rate=0.2, hidden_dropout_prob=0.3, id2label=names)
    assert own.config.drop_path_rate == own.base_model.layers[-1].drop_path_rate == 0.2
    assert own.base_model.layers[0].dropout.p == 0.3
    assert own.config.id2label == names


@pytest.mark.parametrize("own_config", [False, True])
def test_a_configuration_can_be_given(family: Family, tmp_path, images: Tensor, own_config: bool):
    stock = family.stock()
    write_checkpoint(tmp_path, stock)
    config = stock.config if not own_config else family.config.from_pretrained(tmp_path, drop_path_rate=0.3)
    model = family.model.from_pretrained(tmp_path, config=config)
    assert model.config.drop_path_rate == (0.3 if own_config else 0.0)
    assert torch.equal(model(images).last_hidden_state, stock(images).last_hidden_state)
    if own_config:
        assert type(AutoModel.from_pretrained(tmp_path, config=config)) is family.model


@pytest.mark.parametrize("origin", ["stock", "own"])
def test_precision_is_chosen_as_in_transformers(family: Family, tmp_path, origin: str):
    network = getattr(family, origin)()
    write_checkpoint(tmp_path / "single", network)
    write_checkpoint(tmp_path / "half", copy.deepcopy(network).to(torch.bfloat16))
    load = family.model.from_pretrained
    assert load(tmp_path / "single", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(tmp_path / "single", dtype="float64").dtype == torch.float64
    assert load(tmp_path / "half").dtype == torch.bfloat16
    full = load(tmp_path / "half", dtype=torch.float32)
    assert full.dtype == full.config.dtype == torch.float32


def test_subfolders_and_names_are_followed(family: Family, tmp_path):
    stock = family.stock()
    write_checkpoint(tmp_path / "inner", stock)
    own = family.model.from_pretrained(tmp_path, subfolder="inner")
    assert_same_weights(own, stock)
    assert own.name_or_path == str(tmp_path)


def test_revisions_of_a_cached_repository_are_followed(family: Family, tmp_path):
    """The layout of the Hub's cache, filled by hand: two revisions with different weights."""
    repository = tmp_path / "models--org--tiny"
    networks = {}
    for revision, letter, scale in (("main", "a", 1.0), ("v2", "b", 2.0)):
        networks[revision] = family.stock()
        networks[revision].layernorm.weight.data *= scale
        write_checkpoint(repository / "snapshots" / (letter * 40), networks[revision])
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(letter * 40)
    for revision, stock in networks.items():
        own = family.model.from_pretrained("org/tiny", revision=revision, cache_dir=tmp_path, local_files_only=True)
        assert_same_weights(own, stock)
    with pytest.raises(OSError):
        family.model.from_pretrained("org/tiny", revision="v3", cache_dir=tmp_path, local_files_only=True)


def test_token_and_revision_reach_the_requests_for_configuration_and_weights(family: Family, tmp_path, monkeypatch):
    from transformers import configuration_utils, modeling_utils

    write_checkpoint(tmp_path, family.stock())
    asked = []
    read_config, find_weights = configuration_utils.cached_file, modeling_utils._get_resolved_checkpoint_files

    def config_spy(*args, **kwargs):
        asked.append(("config", kwargs["token"], kwargs["revision"]))
        return read_config(*args, **kwargs)

    def weights_spy(*args, **kwargs):
        if kwargs["pretrained_model_name_or_path"] is not None:  # the hand-over in memory asks for no file
            asked.append(("weights", kwargs["download_kwargs"]["token"], kwargs["download_kwargs"]["revision"]))
        return find_weights(*args, **kwargs)

    monkeypatch.setattr(configuration_utils, "cached_file", config_spy)
    monkeypatch.setattr(modeling_utils, "_get_resolved_checkpoint_files", weights_spy)
    family.model.from_pretrained(tmp_path, token="secret", revision="v2")
    assert set(asked) == {("config", "secret", "v2"), ("weights", "secret", "v2")}


def test_device_maps_are_honoured(family: Family, tmp_path, images: Tensor):
    pytest.importorskip("accelerate")
    stock = family.stock()
    write_checkpoint(tmp_path / "model", stock, "old")
    places = {"embeddings": "cpu", "layers.0": "cpu", "layers.1": "disk", "layers.2": "cpu"}
    places.update({"layernorm": "cpu", "pooler": "cpu"})
    own = family.model.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off")
    assert own.hf_device_map == places
    assert own.layers[1].mlp.fc1.weight.device.type == "meta"
    assert torch.equal(own(images).last_hidden_state, stock(images).last_hidden_state)
    assert family.model.from_pretrained(tmp_path / "model", device_map="auto").device.type in ("cpu", "cuda", "mps")


def test_a_weights_folder_loads_with_a_given_configuration(family: Family, tmp_path):
    stock = family.stock()
    write_checkpoint(tmp_path, stock)
    (tmp_path / "config.json").unlink()
    assert_same_weights(family.model.from_pretrained(tmp_path, config=stock.config), stock)
    with pytest.raises(ValueError, match="has no config.json"):
        family.model.from_pretrained(tmp_path)


def test_an_unknown_argument_is_an_error_as_in_transformers(family: Family, tmp_path):
    write_checkpoint(tmp_path, family.stock())
    with pytest.raises(TypeError, match="drop_path_rat"):
        family.model.from_pretrained(tmp_path, drop_path_rat=0.1)


def test_a_state_dict_must_be_complete(family: Family):
    network = family.own()
    weights = network.state_dict()
    own = family.model.from_pretrained(None, config=network.config, state_dict=dict(weights), add_pooling_layer=False)
    assert_same_weights(own, network)
    del weights["layers.1.mlp.fc1.bias"]
    with pytest.raises(ValueError, match="weights missing"):
        family.model.from_pretrained(None, config=network.config, state_dict=weights, add_pooling_layer=False)


@pytest.mark.parametrize("kind", ["model", "classifier"])
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_save_and_reload_is_bit_equal(family: Family, tmp_path, images: Tensor, kind: str, max_shard_size: str):
    write_checkpoint(tmp_path / "stock", family.stock(kind), "old")
    own_class, auto = (
        (family.model, AutoModel) if kind == "model" else (family.classifier, AutoModelForImageClassification)
    )
    own = own_class.from_pretrained(tmp_path / "stock", drop_path_rate=0.1)
    own.save_pretrained(tmp_path / "own", max_shard_size=max_shard_size)
    again, info = auto.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert type(again) is own_class and not any(info.values())
    assert again.config.drop_path_rate == 0.1
    assert_same_weights(again, own)
    for got, expected in zip(again(images).to_tuple(), own(images).to_tuple(), strict=True):
        assert torch.equal(got, expected)


def test_own_checkpoints_carry_the_names_of_the_modules(family: Family, tmp_path):
    own = family.own()
    write_checkpoint(tmp_path / "stock", family.stock(), "old")
    family.model.from_pretrained(tmp_path / "stock", add_pooling_layer=False).save_pretrained(tmp_path / "own")
    assert load_file(tmp_path / "own" / "model.safetensors").keys() == own.state_dict().keys()
