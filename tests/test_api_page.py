"""docs/api.md is what the docstrings say, and every public name has one."""

import ast
import inspect
import runpy

import pytest

import hf_simprune
from hf_simprune.commands import COMMANDS

from .tiny_run import ROOT


@pytest.fixture(scope="module")
def made():
    return runpy.run_path(str(ROOT / "docs" / "make_api.py"))


def test_the_page_is_up_to_date(made):
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == made["page"](), "run python docs/make_api.py"


def test_it_has_every_public_name_and_every_command(made):
    assert sorted(name for names in made["PARTS"].values() for name in names) == sorted(hf_simprune.__all__)
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert all(f"\n### hf-simprune {name}\n" in text for name in COMMANDS)


@pytest.mark.parametrize(
    "name", ["analyze", "plan", "compress", "convert", "evaluate_knn", "evaluate_linear", "publish"]
)
def test_every_argument_is_described(name):
    """By its name, in the part of the docstring on arguments."""
    function = getattr(hf_simprune, name)
    described = inspect.getdoc(function).partition("Args:")[2].partition("\n\n")[0]
    named = {word for line in described.split("\n") for word in line.partition(":")[0].replace(",", " ").split()}
    assert set(inspect.signature(function).parameters) <= named
    assert "Raises:" in inspect.getdoc(function)


def test_every_public_method_says_what_it_does(made):
    silent = [
        f"{name}.{method.name}"
        for name in hf_simprune.__all__
        if isinstance(node := made["definition"](getattr(hf_simprune, name)), ast.ClassDef)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name[0] != "_" and not ast.get_docstring(method)
    ]
    inherited = (
        ".forward",
        ".get_config_dict",
        ".load_state_dict",
        ".post_init",
        ".to_dict",
    )  # what transformers documents
    assert [name for name in silent if not name.endswith(inherited) and ".validate_" not in name] == []


def test_arguments_become_a_list(made):
    text = "Do it.\n\nArgs:\n    a, b: both of\n        them.\n    *rest: more.\n\nReturns:\n    One [`it`]\n    only."
    assert made["markdown"](text) == (
        "Do it.\n\n**Args**\n\n- `a`, `b`: both of them.\n- `*rest`: more.\n\n**Returns**\n\nOne `it` only."
    )
