"""Folders with models, a hub on this machine, and a process that publishes to it."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTModel

from hf_simprune.evaluation.features import build_image_processor
from hf_simprune.models import SimPruneViTConfig, SimPruneViTForImageClassification
from hf_simprune.models.sharing import save_with_code

from .client import Client
from .loopback import LoopbackHub


SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with Client(hub, tmp_path_factory.mktemp("client") / "home") as process:
        yield process


@pytest.fixture
def misbehaving(hub):
    """The same hub with an empty storage; what it was told to do wrong is forgotten afterwards."""
    for kept in (hub.stored, hub.verified, hub.requests):
        kept.clear()
    yield hub
    hub.faults.clear()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """An output folder as a run leaves it, with all that is not for others to see; do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "digits"
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SIZES)).save_pretrained(folder)
    build_image_processor(16, [0.5] * 3, [0.5] * 3).save_pretrained(folder)
    write(folder / "README.md", "---\nlibrary_name: transformers\n---\n\n# a card of our own\n")
    write(folder / "metrics.jsonl", '{"step": 1, "loss": 2.0}\n')
    write(folder / "loss_curve.png", "not really a picture")
    write(folder / ".eval_results" / "benchmark.yaml", "- value: 0.5\n")
    write(folder / "training" / "run.json", "{}")
    write(folder / "training" / "arguments.yaml", "seed: 42\n")
    for name in (
        "training/trackers.json", "training/student/model.safetensors", "training/initial/config.json",
        "training/pruned_tokens.safetensors", "checkpoint-10/model.safetensors", "checkpoint-10/config.json",
        ".partial-checkpoint-20/optimizer.safetensors", "abandoned-checkpoint-3/config.json", "logs/events.out",
        "optimizer.pt", "training_args.bin", ".env", ".cache/token", "modeling_simprune_vit.py", "notes.txt",
    ):  # fmt: skip
        write(folder / name, name)
    return folder


@pytest.fixture
def run_folder(finished_run, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(finished_run, tmp_path / "digits"))


@pytest.fixture(scope="session")
def compressed(tmp_path_factory):
    """A classifier that no stock class can express: a linear map for a block, and merging tokens; with its code."""
    folder = tmp_path_factory.mktemp("compressed") / "smaller"
    torch.manual_seed(1)
    maps = {"1": {"kind": "linear"}}
    config = SimPruneViTConfig(**SIZES | {"num_hidden_layers": 3}, num_labels=3, block_maps=maps)
    config.token_reduction, config.keep_rate, config.reduction_layers = "tome", 0.75, [0]
    save_with_code(SimPruneViTForImageClassification(config), folder)
    build_image_processor(16, [0.5] * 3, [0.5] * 3).save_pretrained(folder)
    write(folder / "README.md", "---\nlibrary_name: transformers\n---\n\n# a card of our own\n")
    write(folder / "compression.json", "{}")
    write(folder / "redundancy.json", "{}")
    write(folder / "redundancy.png", "not really a picture")
    return folder


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
