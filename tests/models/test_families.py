"""Registration with the Auto classes, and the promises made about the source files."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from hf_simprune import models
from hf_simprune.models.bundle import bundle_reduction

from ..elsewhere import run
from .conftest import TINY, Family


FOLDER = Path(models.__file__).parent


def test_auto_classes_build_the_own_classes(family: Family):
    config = AutoConfig.for_model(f"simprune_{family.name}", **TINY, drop_path_rate=0.1)
    assert type(config) is family.config
    assert type(AutoModel.from_config(config)) is family.model
    assert type(AutoModelForImageClassification.from_config(config)) is family.classifier


def test_registering_again_changes_nothing(family: Family):
    importlib.reload(models)
    assert AutoConfig.for_model(f"simprune_{family.name}").__class__ is family.config


def test_stock_checkpoints_keep_their_stock_classes(family: Family, tmp_path):
    family.stock().save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is family.stock_model


def test_importing_the_package_registers_nothing():
    code = (
        "import hf_simprune, sys; assert 'transformers' not in sys.modules; from transformers import AutoConfig\n"
        "try: AutoConfig.for_model('simprune_vit')\n"
        "except ValueError: print('unknown')\n"
        "import hf_simprune.models; print(AutoConfig.for_model('simprune_vit').model_type)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["unknown", "simprune_vit"]


PARTS = ("blocks", "configuration", "maps", "modeling", "reduction")


@pytest.mark.parametrize("file", [f"{part}_simprune_vit.py" for part in PARTS])
def test_the_deit_files_are_the_vit_files_renamed(file: str):
    """Shipped files may not import from each other, so the families repeat one text: edit the ViT's, then rename."""
    vit = (FOLDER / "vit" / file).read_text().replace("ViT", "DeiT").replace("vit", "deit")
    deit = (FOLDER / "deit" / file.replace("vit", "deit")).read_text()
    assert ast.dump(ast.parse(vit)) == ast.dump(ast.parse(deit))


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_shipped_files_stand_alone(name: str):
    """They go to the Hub without this package: nothing but torch, transformers, its Hub library and the siblings."""
    files = sorted((FOLDER / name).glob("*_simprune_*.py"))
    assert [file.name for file in files] == [f"{part}_simprune_{name}.py" for part in PARTS]
    for file in files:
        if file.name.startswith("reduction"):
            continue  # another file takes its place, see test_bundle.py
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                if node.level:
                    assert node.level == 1
                    assert node.module in [f"{part}_simprune_{name}" for part in PARTS]
                else:
                    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
                    assert node.module.split(".")[0] in allowed, ast.unparse(node)
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in {"torch", *sys.stdlib_module_names} for alias in node.names)


def test_shipped_files_load_without_the_package(family: Family, tmp_path):
    """With `trust_remote_code=True`, in a process that cannot import this package, to the same bits."""
    network = family.own()
    network.config.auto_map = {
        "AutoConfig": f"configuration_simprune_{family.name}.{family.config.__name__}",
        "AutoModel": f"modeling_simprune_{family.name}.{family.model.__name__}",
    }
    network.save_pretrained(tmp_path / "model")
    for file in (FOLDER / family.name).glob("*_simprune_*.py"):
        text = bundle_reduction(None) if file.name.startswith("reduction") else file.read_text()
        (tmp_path / "model" / file.name).write_text(text)
    images = torch.randn(2, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    torch.save(network(images).last_hidden_state, tmp_path / "features.pt")
    code = f"""
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True, add_pooling_layer=False)
features = model(torch.load({str(tmp_path / "images.pt")!r})).last_hidden_state
print(type(model).__name__, torch.equal(features, torch.load({str(tmp_path / "features.pt")!r})))
"""
    done = run(["-c", code], tmp_path, PATH="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [family.model.__name__, "True"]
