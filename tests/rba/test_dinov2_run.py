"""DINOv2 compressed with maps and halves of blocks, from a stock folder to one that loads without this package."""

import json
import os

import pytest
import torch
from transformers import AutoModel, Dinov2Model

from hf_simprune.cli import main
from hf_simprune.models import SimPruneDinov2Model
from hf_simprune.rba.converter import convert
from hf_simprune.rba.plan import CompressionPlan, Half, Span

from ..elsewhere import run
from ..tiny_run import write_images
from .tiny_compression import DEPTH, IMAGE_SIZE, dinov2, save_checkpoint


SPEED = ["--batch_size", "16", "--max_span", "2", "--cost_images", "8", "--disable_tqdm"]
ALONE = """
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
images, expected = torch.load(sys.argv[2])
hidden = model(images, output_hidden_states=True)
print(type(model).__name__, torch.allclose(hidden.last_hidden_state, expected, atol=1e-5), len(hidden.hidden_states))
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images.parquet", 48)


def compress(model, images, folder, *words):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    assert main(["compress", str(model), "--dataset", images, "--output", str(folder), *SPEED, *words]) == 0
    return CompressionPlan.from_dict(json.loads((folder / "compression.json").read_text())["plan"])


def test_maps_and_halves_are_measured_chosen_saved_and_load_without_the_package(images, tmp_path):
    source = save_checkpoint(tmp_path / "dino", dinov2())
    chosen = compress(source, images, tmp_path / "halves", "--max-flops", "0.8x", "--granularity", "half")
    assert chosen.items and type(AutoModel.from_pretrained(tmp_path / "halves")) in (SimPruneDinov2Model, Dinov2Model)

    plan = CompressionPlan(
        DEPTH, (Span(2, 3, "low_rank", 3),), (Half(0, "mlp", "linear"), Half(4, "attention", "const"))
    )
    plan.save(tmp_path / "plan.json")
    compress(source, images, tmp_path / "small", "--plan", str(tmp_path / "plan.json"))
    model = AutoModel.from_pretrained(tmp_path / "small")
    assert type(model) is SimPruneDinov2Model
    assert set(model.config.block_maps) == {"0", "2", "4"}
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        torch.save((pixels, model(pixels).last_hidden_state), tmp_path / "expected.pt")
    found = run(["-c", ALONE, str(tmp_path / "small"), str(tmp_path / "expected.pt")], tmp_path)
    assert found.stdout.split() == ["SimPruneDinov2Model", "True", str(DEPTH + 1)], found.stderr

    # what is a map already may go, and then the network is a stock one again
    gone = tuple(Span(block, block + 1, "identity") for block in (0, 2, 4))
    assert type(convert(model, CompressionPlan(DEPTH, gone), {})) is Dinov2Model
