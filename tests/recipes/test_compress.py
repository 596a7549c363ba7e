"""`recipes/compress.py` as it is typed, with a settings file and through accelerate; the result elsewhere."""

import json
import subprocess
import sys

import pytest
import yaml

from ..elsewhere import run
from ..rba.tiny_compression import environment, save_checkpoint
from ..tiny_run import ROOT, write_images


RECIPE = ROOT / "recipes" / "compress.py"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--mixed_precision", "no"]
STOCK = """
import sys
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1], device="cpu", trust_remote_code=sys.argv[3] == "code")
print(type(classify.model).__name__, len(classify(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Output folders of two runs: one of folds, one with a linear map."""
    folder = tmp_path_factory.mktemp("compress")
    settings = {
        "model_name_or_path": save_checkpoint(folder / "vit"),
        "dataset": write_images(folder / "images.parquet", 60),
        "remove_blocks": 1,
        "map": ["fold"],
        "max_span": 2,
        "output": str(folder / "fold"),
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    config = ["--config", str(folder / "settings.yaml")]
    launched = [*LAUNCH, str(RECIPE), *config]
    found = subprocess.run(launched, env=environment(), capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    typed = [str(RECIPE), *config, "--map", "linear", "--output-dir", str(folder / "linear")]
    found = run(typed, folder, package=True)
    assert found.returncode == 0, found.stderr
    return folder


def test_the_recipe_does_everything(finished):
    record = json.loads((finished / "fold" / "compression.json").read_text())
    assert len(record["plan"]["spans"]) == 1 and record["training_free"]["images"] == 20
    assert record["command"].startswith("python ") and "recipes/compress.py" in record["command"]
    linear = json.loads((finished / "linear" / "compression.json").read_text())
    assert linear["plan"]["spans"][0]["map"] == "linear"  # the command line wins


@pytest.mark.parametrize(
    ("name", "loads"), [("fold", "ViTForImageClassification"), ("linear", "SimPruneViTForImageClassification")]
)
def test_the_result_classifies_where_this_package_is_not(finished, name, loads, tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    words = [str(finished / name), str(tmp_path / "red.png"), "code" if name == "linear" else "stock"]
    found = run(["-c", STOCK, *words], tmp_path)
    assert found.stdout.split() == [loads, "4"], found.stderr


def test_help_does_not_wait_for_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['compress.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(RECIPE)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print('status', end.code, 'torch' in sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert found.stdout.splitlines()[-1] == "status 0 False", found.stderr
