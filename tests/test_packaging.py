"""What is installed is complete, light to import, and runs the recipes from anywhere."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_simprune


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with hatchling

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "datasets", "accelerate", "matplotlib")


def run_python(*words: str, folder: Path, path: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that `pip install .` would build."""
    from hatchling.builders.wheel import WheelBuilder

    (artifact,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])
    return Path(artifact)


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    code = f"import sys, hf_simprune; print([m for m in {HEAVY} if m in sys.modules])"
    result = run_python("-c", code, folder=tmp_path, path=ROOT)
    assert result.stdout.strip() == "[]", result.stderr


def test_help_does_not_wait_for_torch(tmp_path):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['train_dino.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'recipes' / 'train_dino.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print('status', end.code, 'torch' in sys.modules)\n"
    )
    result = run_python("-c", code, folder=tmp_path, path=ROOT)
    assert result.stdout.splitlines()[-1] == "status 0 False", result.stderr
    assert "--keep_rate" in result.stdout


@pytest.mark.parametrize("name", hf_simprune.__all__)
def test_every_public_name_loads(name):
    assert getattr(hf_simprune, name).__name__ == name
    assert name in dir(hf_simprune)


def test_public_names_are_the_same_for_type_checkers():
    """The imports under TYPE_CHECKING, which are never run, name what `__getattr__` finds."""
    tree = ast.parse(Path(hf_simprune.__file__).read_text())
    declared = {
        alias.name: "." * node.level + node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        for alias in node.names
    }
    assert declared == hf_simprune._HOME
    assert {*declared, "InputError"} == set(hf_simprune.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'SimPrune'"):
        hf_simprune.SimPrune  # noqa: B018


def test_versions_agree(project):
    assert project["version"] == hf_simprune.__version__
    assert "transformers>=5.23,<6" in project["dependencies"]
    constraints = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^torch==2\.13\.0$", constraints, re.MULTILINE)
    assert any(requirement.startswith("torch>=") for requirement in project["dependencies"])


def test_trackers_and_torchvision_are_extras_only(project):
    required = {re.split(r"[<>=]", requirement)[0] for requirement in project["dependencies"]}
    assert not required & {"torchvision", "wandb", "trackio", "tensorboard", "kornia", "scikit-learn"}
    assert {"test", "quality", "demo", "tensorboard", "wandb", "trackio", "torchvision"} <= set(
        project["optional-dependencies"]
    )


def test_what_the_package_imports_is_required(project):
    """Every third-party import of the package and of the training recipe is a dependency; the page has an extra."""
    names = {"PIL": "pillow", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    required = {re.split(r"[<>=]", requirement)[0] for requirement in project["dependencies"]}
    page = {re.split(r"[<>=]", requirement)[0] for requirement in project["optional-dependencies"]["explore"]}
    for path in [*(ROOT / "hf_simprune").rglob("*.py"), ROOT / "recipes" / "train_dino.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            imported = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported = [node.module]
            for module in {name.split(".")[0] for name in imported} - {*sys.stdlib_module_names, "hf_simprune"}:
                known = required | page if path.parent.name == "explore" else required
                assert names.get(module, module) in known, f"{path.name} imports {module}"


def test_wheel_holds_every_file_of_the_package(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_simprune").rglob("*") if path.is_file()}
    expected = {name for name in files if "__pycache__" not in name}
    assert packed == expected
    assert "hf_simprune/py.typed" in packed


def test_recipe_runs_against_the_installed_wheel(wheel, tmp_path):
    installed, recipes = tmp_path / "installed", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(installed)
    shutil.copytree(ROOT / "recipes", recipes)
    result = run_python("train_dino.py", "--keep_rate", "2", "--output_dir", "o", folder=recipes, path=installed)
    assert result.returncode == 2
    assert (
        result.stderr == "error: --dataset_name_or_path is required: give it on the command line or in the YAML file\n"
    )
    where = run_python("-c", "import hf_simprune; print(hf_simprune.__file__)", folder=recipes, path=installed)
    assert Path(where.stdout.strip()).is_relative_to(installed)


def test_make_targets_exist_and_continuous_integration_calls_two():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "quality", "style"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.findall(r"^make (\w+)$", script.read_text(), re.MULTILINE) == ["test", "quality"]
