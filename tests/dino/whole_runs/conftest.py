"""Fixtures that train a tiny run in this process."""

import pytest
from accelerate.state import AcceleratorState

from hf_simprune.dino.argument_parsing import parse_arguments
from hf_simprune.dino.run import run_training

from ...tiny_run import words, write_images


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    """Every run starts an accelerator of its own."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images.parquet")


@pytest.fixture
def train(images, tmp_path, monkeypatch):
    """Trains with the tiny options, changed, and returns the output folder; pictures are left out, to save time."""
    monkeypatch.setattr("hf_simprune.dino.run.draw_pictures", lambda *_: None)

    def run(name="run", **changes):
        folder = tmp_path / name
        AcceleratorState._reset_state(True)
        run_training(parse_arguments(words(output_dir=folder, **({"dataset_name_or_path": images} | changes))))
        return folder

    return run
