"""Token reduction as one file: what it imports, that it computes the same, and that folders with it work alone."""

import ast
import inspect
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_simprune import models
from hf_simprune.models.bundle import bundle_reduction
from hf_simprune.models.sharing import save_with_code
from hf_simprune.models.vit import reduction_simprune_vit
from hf_simprune.reduction import methods

from .conftest import DEIT, VIT
from .test_inference_reduction import METHODS, reduced
from .test_sharing import run_alone


FOLDER = Path(models.__file__).parent


def as_module(source: str) -> types.ModuleType:
    module = types.ModuleType("joined_reduction")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(source, module.__name__, "exec"), vars(module))
    return module


@pytest.mark.parametrize("method", [None, *METHODS])
def test_the_file_has_the_names_it_stands_for_and_needs_only_torch(method: str | None):
    source = bundle_reduction(method)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert {name.split(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}
    module = as_module(source)
    for name in reduction_simprune_vit.__all__:
        assert hasattr(module, name), name
    assert list(module.INFERENCE_METHODS) == ([] if method is None else [method])
    others = {methods.INFERENCE_METHODS[name].__name__ for name in METHODS if name != method}
    assert not others & vars(module).keys()


@pytest.mark.parametrize("method", METHODS)
def test_the_file_says_what_the_package_says(method: str):
    """No word is lost or changed: every class and function has the source it has in its own file."""
    module = as_module(bundle_reduction(method))
    tree = ast.parse(bundle_reduction(method))
    found = {node.name: ast.dump(node) for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    files = ["token_maps", "base", "walk", "attention", "inference", method]
    expected = {}
    for file in files:
        text = inspect.getsource(sys.modules[f"hf_simprune.reduction.{file}"])
        expected |= {
            node.name: ast.dump(node)
            for node in ast.parse(text).body
            if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        }
    assert found.pop("InputError") and found == expected
    assert issubclass(module.InputError, ValueError)


@pytest.mark.parametrize("method", METHODS)
def test_the_file_decides_as_the_package_does(method: str, images: Tensor):
    joined = as_module(bundle_reduction(method))
    model = reduced(VIT, method)
    outputs = []
    for code in (reduction_simprune_vit, joined):
        reducer = code.reducer_of(model.config, code.INFERENCE_METHODS, 1, (4, 4))
        walk = code.BranchWalk(reducer, 1, (4, 4), records_before=True)
        tokens = model.embed(images)
        for index, layer in enumerate(model.layers):
            tokens = walk.block(index, layer, tokens)
        outputs.append((tokens, walk.restore(tokens)))
    assert type(reducer).__module__ == "joined_reduction"
    for got, expected in zip(*outputs, strict=True):
        assert torch.equal(got, expected)


def test_what_cannot_be_joined_is_an_error(monkeypatch):
    from hf_simprune.reduction import tome, walk

    text = inspect.getsource(tome)
    getsource = inspect.getsource
    for change, message in (
        (f"{text}\nclass BranchWalk: ...\n", "reduction.walk and hf_simprune.reduction.tome both define BranchWalk"),
        (f"from .random import RandomReducer\n{text}", "is of no file that is joined"),
        (f"from .base import keep_count as count\n{text}", "is of no file that is joined, or renames"),
    ):
        monkeypatch.setattr(inspect, "getsource", lambda of, change=change: change if of is tome else getsource(of))
        with pytest.raises(ValueError, match=message):
            bundle_reduction("tome")
    assert walk


def test_only_one_copy_of_a_method_is_in_the_repository():
    for file in FOLDER.glob("*/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                assert "Reducer" not in node.name, file


def test_folders_with_a_method_load_without_the_package_to_the_same_bits(tmp_path, images: Tensor):
    torch.save(images, tmp_path / "images.pt")
    for family in (VIT, DEIT):
        for method in METHODS:
            model = reduced(family, method, "classifier", restore_tokens=True)
            folder = tmp_path / f"{family.name}_{method}"
            save_with_code(model, folder)
            (joined,) = folder.glob("reduction_*.py")
            assert joined.name == f"reduction_simprune_{family.name}.py"
            assert joined.read_text() == bundle_reduction(method)
            torch.save((model(images).logits, model.base_model(images).last_hidden_state), folder / "expected.pt")
    printed = run_alone(
        f"""
import torch
from pathlib import Path
from transformers import AutoModel, AutoModelForImageClassification
images = torch.load("images.pt")
for folder in sorted(path.parent for path in Path({str(tmp_path)!r}).glob("*/expected.pt")):
    logits, features = torch.load(folder / "expected.pt")
    classifier = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    backbone = AutoModel.from_pretrained(folder, trust_remote_code=True, add_pooling_layer=False)
    equal = torch.equal(classifier(images).logits, logits), torch.equal(backbone(images).last_hidden_state, features)
    print(folder.name, *equal)
classifier.save_pretrained("again")
again = AutoModelForImageClassification.from_pretrained("again", trust_remote_code=True, restore_tokens=False)
print(torch.equal(again(images).logits, logits))
try:
    AutoModel.from_pretrained(folder, trust_remote_code=True, add_pooling_layer=False, token_reduction="none")
except ValueError as error:
    print(str(error).replace(" ", "_"))
""",
        tmp_path,
    )
    folders = sorted(f"{family.name}_{method}" for family in (VIT, DEIT) for method in METHODS)
    expected = [word for folder in folders for word in (folder, "True", "True")]
    assert printed == [*expected, "True", "token_reduction_'none'_is_not_for_inference:_choose_one_of_tome."]
