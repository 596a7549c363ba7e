"""A tiny model and a few pictures, shared by all tests of the page."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_simprune.explore.explorer import Explorer
from hf_simprune.rba.checkpoint import Checkpoint, load_checkpoint

from ..rba.tiny_compression import save_checkpoint
from ..tiny_run import write_images


def picture(seed: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    """A picture with large areas, so that patches differ and views of one place are alike."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("explore") / "tiny-vit"
    save_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def data_set(tmp_path_factory) -> str:
    return write_images(tmp_path_factory.mktemp("explore") / "images.parquet", count=12)


@pytest.fixture(scope="session")
def checkpoint(model_folder) -> Checkpoint:
    return load_checkpoint(str(model_folder))


@pytest.fixture(scope="session")
def explorer(checkpoint) -> Explorer:
    return Explorer(checkpoint, [picture(seed) for seed in range(9)], timed_seconds=0.0)
