"""The way back to a stock folder that needs no package."""

import copy
import json

import pytest
import torch
from torch import Tensor

from hf_simprune.errors import InputError
from hf_simprune.models.stock import to_stock

from ..elsewhere import run
from .conftest import TINY, Family


def test_the_stock_copy_gives_the_same_features(family: Family, images: Tensor):
    own = family.own(drop_path_rate=0.4)
    stock = to_stock(own.train())
    assert type(stock) is family.stock_model and not stock.training and own.training
    output = stock(images)
    expected = own.eval()(images).last_hidden_state
    assert torch.equal(output.last_hidden_state, expected)
    assert torch.equal(output.pooler_output, expected[:, 0])


def test_the_stock_copy_shares_nothing_with_the_model(family: Family, images: Tensor):
    own = family.own()
    stock = to_stock(own)
    before = stock(images).last_hidden_state.clone()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.zero_()
    own.config.hidden_size = 1
    assert torch.equal(stock(images).last_hidden_state, before)
    assert stock.config.hidden_size == TINY["hidden_size"]


def test_converting_draws_no_random_numbers(family: Family):
    own = family.own()
    state = torch.get_rng_state()
    to_stock(own)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pooler_of_the_model_is_replaced(family: Family, images: Tensor):
    own = family.model(family.config(**TINY, pooler_act="relu")).eval()
    output = to_stock(own)(images)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])


def test_precision_and_trainability_carry_over(family: Family):
    own = copy.deepcopy(family.own()).to(torch.bfloat16).requires_grad_(False)
    stock = to_stock(own)
    assert {parameter.dtype for parameter in stock.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in stock.parameters())


def test_only_backbones_of_this_package_are_taken(family: Family):
    with pytest.raises(InputError, match=f"got {family.stock_model.__name__}"):
        to_stock(family.stock())
    with pytest.raises(InputError, match="pass its backbone"):
        to_stock(family.classifier(family.config(**TINY)))


def test_the_saved_folder_loads_elsewhere_to_the_same_bits(family: Family, tmp_path, images: Tensor):
    """A process that cannot import this package: nothing missing, nothing random, the same features."""
    own = family.own(drop_path_rate=0.1)
    to_stock(own).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == family.name and config["architectures"] == [family.stock_model.__name__]
    assert config["pooler_act"] == "linear" and "drop_path_rate" not in config and "auto_map" not in config
    torch.save(images, tmp_path / "images.pt")
    torch.save(own(images).last_hidden_state, tmp_path / "features.pt")
    code = f"""
import torch
from transformers import AutoModel
model, info = AutoModel.from_pretrained({str(tmp_path / "model")!r}, output_loading_info=True)
output = model(torch.load({str(tmp_path / "images.pt")!r}))
features = torch.load({str(tmp_path / "features.pt")!r})
print(type(model).__name__, any(info.values()), torch.equal(output.last_hidden_state, features),
      torch.equal(output.pooler_output, features[:, 0]))
"""
    done = run(["-c", code], tmp_path, fresh=family.name == "vit")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [family.stock_model.__name__, "False", "True", "True"]


def test_the_way_there_and_back_changes_no_weight(family: Family, tmp_path):
    own = family.own()
    to_stock(own).save_pretrained(tmp_path)
    again = family.model.from_pretrained(tmp_path, add_pooling_layer=False)
    assert again.config.layer_norm_eps == 1e-6
    for name, value in own.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
