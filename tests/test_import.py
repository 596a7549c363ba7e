"""`import hf_simprune` costs nothing, and its names are there once they are touched."""

import json
import subprocess
import sys
import time

import pytest

import hf_simprune

from .tiny_run import ROOT


HEAVY = ("torch", "transformers", "datasets", "accelerate", "huggingface_hub", "numpy", "yaml", "PIL", "matplotlib")
FRESH = f"""
import json, sys
before = set(sys.meta_path), set(sys.path_hooks)
import hf_simprune
loaded = [name for name in {HEAVY} if name in sys.modules]
hooks = (set(sys.meta_path), set(sys.path_hooks)) == before
listed = dir(hf_simprune)
still = [name for name in {HEAVY} if name in sys.modules]
own = sorted(name for name in sys.modules if name.startswith("hf_simprune"))
hf_simprune.CompressionPlan(4)  # needs none of them
plan = [name for name in {HEAVY} if name in sys.modules]
print(json.dumps([loaded, hooks, still, own, plan, "torch" in sys.modules, len(listed)]))
"""


def test_importing_it_loads_nothing_and_hooks_nothing():
    found = subprocess.run([sys.executable, "-c", FRESH], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    loaded, hooks_untouched, still, own, plan, torch, listed = json.loads(found.stdout)
    assert loaded == still == plan == [] and hooks_untouched and not torch
    assert own == ["hf_simprune", "hf_simprune.errors"]
    assert listed >= len(hf_simprune.__all__)


def test_how_long_it_takes_beside_an_empty_program():
    """A ratio to read; what it rests on, that nothing heavy is loaded, is asserted above."""
    seconds = {"pass": [], "import hf_simprune": []}
    for _ in range(5):
        for code, times in seconds.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
            times.append(time.perf_counter() - began)
    plain, ours = (sorted(times)[2] for times in seconds.values())
    print(f"python -c pass {1e3 * plain:.0f} ms, with import hf_simprune {1e3 * ours:.0f} ms: x{ours / plain:.2f}")
    assert ours - plain < 2  # whatever else the machine does


@pytest.mark.parametrize(
    "name", ["DinoTrainer", "analyze", "plan", "compress", "evaluate_knn", "evaluate_linear", "publish"]
)
def test_the_surface_fits_a_page(name):
    assert name in hf_simprune.__all__ and callable(getattr(hf_simprune, name))
    assert len(hf_simprune.__all__) <= 30


def test_the_old_name_is_gone():
    assert "choose" not in dir(hf_simprune)
    with pytest.raises(AttributeError, match="no attribute 'choose'"):
        hf_simprune.choose  # noqa: B018
