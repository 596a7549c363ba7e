"""DINOv2 beside the other families: registration, source files, networks by name, and the way back to stock."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_simprune import models
from hf_simprune.errors import InputError
from hf_simprune.models.architectures import ARCHITECTURES, build_backbone
from hf_simprune.models.stock import to_stock

from ..elsewhere import run
from .dinov2_family import DINOV2, Dinov2Family
from .test_families import (  # noqa: F401
    test_auto_classes_build_the_own_classes,
    test_registering_again_changes_nothing,
    test_stock_checkpoints_keep_their_stock_classes,
)
from .test_stock import (  # noqa: F401
    test_converting_draws_no_random_numbers,
    test_precision_and_trainability_carry_over,
    test_the_stock_copy_gives_the_same_features,
    test_the_stock_copy_shares_nothing_with_the_model,
    test_the_way_there_and_back_changes_no_weight,
)


FOLDER = Path(models.__file__).parent
# Parameters of DINOv2's ViT-S/14 and ViT-B/14 for images of 518 pixels; tiny has the sizes of DeiT-tiny.
PUBLISHED = {"dinov2_small": 22_056_576, "dinov2_base": 86_580_480}


@pytest.fixture
def family() -> Dinov2Family:
    return DINOV2


@pytest.mark.parametrize("part", ["blocks", "maps", "reduction"])
def test_the_shared_files_are_the_vit_files_renamed(part: str):
    """Shipped files may not import from each other, so the families repeat one text: edit the ViT's, then rename."""
    text = (FOLDER / "vit" / f"{part}_simprune_vit.py").read_text()
    for vit, dinov2 in (
        ("ViT", "Dinov2"),
        ("vit", "dinov2"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("layer.dropout(layer.mlp", "layer.layer_scale2(layer.mlp"),
        ("layer.dropout", "layer.layer_scale1"),
    ):
        text = text.replace(vit, dinov2)
    found = (FOLDER / "dinov2" / f"{part}_simprune_dinov2.py").read_text()
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(found))


def test_shipped_files_stand_alone():
    """They go to the Hub without this package; in the folder, the reduction file is replaced by one that stands."""
    siblings = {path.stem for path in (FOLDER / "dinov2").glob("*_simprune_*.py")}
    assert len(siblings) == 6
    for name in siblings - {"reduction_simprune_dinov2"}:
        for node in ast.walk(ast.parse((FOLDER / "dinov2" / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom):
                if node.level:
                    assert node.level == 1 and node.module in siblings
                else:
                    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
                    assert node.module.split(".")[0] in allowed, ast.unparse(node)
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in {"torch", *sys.stdlib_module_names} for alias in node.names)


def test_only_backbones_have_a_stock_copy(family: Dinov2Family):
    with pytest.raises(InputError, match="got Dinov2Model"):
        to_stock(family.stock())
    with pytest.raises(InputError, match="pass its backbone"):
        to_stock(family.own("classifier"))


def test_the_saved_stock_folder_loads_elsewhere_to_the_same_bits(tmp_path, images: Tensor):
    """A process that cannot import this package: nothing missing, nothing random, the same features."""
    own = DINOV2.own(drop_path_rate=0.1, use_swiglu_ffn=True)
    to_stock(own).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "dinov2" and config["architectures"] == ["Dinov2Model"]
    assert not {"block_maps", "auto_map", "token_reduction", "keep_rate", "pooler_act"}.intersection(config)
    assert config["stage_names"][-1] == "stage3" and config["out_features"] == ["stage3"]
    torch.save(images, tmp_path / "images.pt")
    torch.save(own(images).last_hidden_state, tmp_path / "features.pt")
    code = f"""
import torch
from transformers import AutoModel
model, info = AutoModel.from_pretrained({str(tmp_path / "model")!r}, output_loading_info=True)
for parameter in model.parameters():  # a product may round by where in memory its factors lie, here in a file
    parameter.data = parameter.data.clone()
output = model(torch.load({str(tmp_path / "images.pt")!r}))
features = torch.load({str(tmp_path / "features.pt")!r})
print(type(model).__name__, any(info.values()), torch.equal(output.last_hidden_state, features),
      torch.equal(output.pooler_output, features[:, 0]))
"""
    done = run(["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Dinov2Model", "False", "True", "True"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str):
    with torch.device("meta"):
        model = build_backbone(name, image_size=518)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
    assert type(model) is models.SimPruneDinov2Model


def test_an_architecture_has_the_defaults_of_dinov2s_training():
    model = build_backbone("dinov2_tiny", 28, num_hidden_layers=2, drop_path_rate=0.1)
    config = model.config
    assert (config.patch_size, config.layerscale_value, config.mlp_ratio) == (14, 1e-5, 4)
    assert config.use_mask_token and not config.use_swiglu_ffn and config.layer_norm_eps == 1e-6
    assert ARCHITECTURES["dinov2_tiny"]["hidden_size"] == 192
    assert model.embed(torch.zeros(1, 3, 28, 28)).shape == (1, 5, 192) and model.layers[-1].drop_path_rate == 0.1


def test_settings_of_an_architecture_can_be_overridden():
    model = build_backbone(
        "dinov2_small", 32, patch_size=8, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        use_swiglu_ffn=True, use_mask_token=False, layerscale_value=0.1,
    )  # fmt: skip
    assert model.config.mlp_ratio == 2 and model.layers[0].mlp.gate_proj.weight.shape == (64, 48)
    assert model.embeddings.mask_token is None and model.layers[1].layer_scale2.lambda1[0].item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "dinov2_huge"}, "architecture 'dinov2_huge' is unknown; choose one of .*dinov2_base$"),
        ({"intermediate_size": 200}, "intermediate_size 200 must be a multiple of hidden_size 192"),
        ({"intermediate_size": 0}, "intermediate_size 0 must be a multiple of hidden_size 192"),
        ({"image_size": 32}, "patch_size 14 does not divide image_size 32"),
        ({"use_swiglu_ffn": "maybe"}, "use_swiglu_ffn"),
        ({"name": "vit_tiny", "layerscale_value": 0.1, "patch_size": 14}, "setting 'layerscale_value' is unknown"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: dict, message: str):
    with pytest.raises(InputError, match=message) as caught:
        build_backbone(**{"name": "dinov2_tiny", "image_size": 28, **arguments})
    assert "\n" not in str(caught.value)


def test_the_rule_for_shared_files_is_the_one_of_the_makefile():
    makefile = FOLDER.parent.parent / "Makefile"
    if not makefile.is_file():
        pytest.skip("an installed package has no Makefile")
    families = makefile.read_text().split("\nfamilies:")[1]
    assert re.search(r"for part in blocks maps reduction; do", families)
    assert "s/layernorm_before/norm1/g" in families and "s/layer\\.dropout/layer.layer_scale1/" in families
