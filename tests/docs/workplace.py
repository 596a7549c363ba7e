"""Where the blocks of the documents are run: folders, a Hub on this machine, and the process that answers commands."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTModel, ViTMSNConfig, ViTMSNModel

from hf_simprune.evaluation.features import build_image_processor

from ..hub.loopback import TOKEN, LoopbackHub
from ..tiny_run import png, write_images
from .blocks import EXECUTED, ROOT, Block, apply_diff


COMMANDS = ("hf-simprune", "python", "accelerate", "torchrun", "make")
USER = "me"  # as the documents call whoever reads them
IMAGES, CLASSES, SIDE = 36, ("bird", "cat", "fish", "hare"), 40
_SIZES = {
    "hidden_size": 24, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.3,
}  # fmt: skip


class Workplace:
    """Runs blocks; each document has a folder of its own, with what a newcomer has: this repository and some images.

    Attributes:
        hub: what is published goes there, and comes from there.
        seconds: CPU seconds that the commands of each document took.
    """

    def __init__(self, folder: Path, hub: LoopbackHub, address: Path) -> None:
        self.folder, self.hub, self.address = folder, hub, address
        self.seconds: dict[str, float] = {}

    def run(self, block: Block) -> str | None:
        """Returns what went wrong, None where nothing did."""
        if block.reason is not None or block.changes_package or block.language not in EXECUTED:
            return None
        place = self.place_of(block.document)
        if block.file is not None:
            (place / block.file).write_text(block.text, encoding="utf-8")
            return None
        if block.language == "python":
            script = self.folder / "block.py"
            script.write_text(block.text, encoding="utf-8")
            status, said = self._ask(block, ["block", str(script), block.place], place)
        else:
            status, said = self._in_bash(block, place)
        return None if status == 0 else f"{block.place}: status {status}\n{block.text}{said[-3000:]}"

    def place_of(self, document: str) -> Path:
        """The folder of a document; `make demo` was run before any but the first."""
        place = self.folder / document.replace("/", "-").removesuffix(".md")
        if not place.exists():
            (place / "path" / "to").mkdir(parents=True)
            (place / "outputs").mkdir()
            for name in ("recipes", "benchmarks", "Makefile", "pyproject.toml", "constraints.txt"):
                (place / name).symlink_to(ROOT / name)
            (place / "path" / "to" / "images").symlink_to(self.folder / "images")
            (place / ".venv").symlink_to(self.folder / ".venv")
            if document != "README.md":
                (place / "outputs" / "demo").symlink_to(self.folder / "README" / "outputs" / "demo")
        return place

    def _in_bash(self, block: Block, place: Path) -> tuple[int, str]:
        path = f"{self.folder / '.venv' / 'bin'}:{os.environ['PATH']}"
        found = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=place,
            env={**os.environ, "PATH": path, "NEWCOMER_PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=300,
        )
        for line in (self.folder / "seconds").read_text().splitlines() if (self.folder / "seconds").exists() else ():
            self._count(block, float(line))
        (self.folder / "seconds").unlink(missing_ok=True)
        return found.returncode, found.stdout + found.stderr

    def _ask(self, block: Block, words: Sequence[str], place: Path) -> tuple[int, str]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(300)
            connection.connect(str(self.address))
            connection.sendall(json.dumps({"words": words, "folder": str(place)}).encode() + b"\n")
            with connection.makefile() as stream:
                answer: dict[str, Any] = json.loads(stream.readline())
        self._count(block, answer["seconds"])
        return answer["status"], answer["out"] + answer["err"]

    def _count(self, block: Block, seconds: float) -> None:
        self.seconds[block.place] = self.seconds.get(block.place, 0.0) + seconds


@contextlib.contextmanager
def workplace(folder: Path, blocks: Sequence[Block]) -> Iterator[Workplace]:
    """Everything there is before the first block; the package is a copy with what the blocks add to it."""
    package = folder / "package"
    shutil.copytree(ROOT / "hf_simprune", package / "hf_simprune")
    change_package(package, blocks)
    write_class_folders(folder / "images")
    address = folder / "newcomer"
    write_commands(folder / ".venv" / "bin", address, folder / "seconds")
    with LoopbackHub() as hub:
        hub.tokens[TOKEN] = USER
        fill(hub, folder / "hub")
        environment = hub.environment(folder / "home") | {
            "PYTHONPATH": os.pathsep.join((str(package), str(ROOT))),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "TQDM_DISABLE": "1",
        }
        words = [sys.executable, "-m", "tests.docs.newcomer", str(address), str(package)]
        with subprocess.Popen(words, cwd=package, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            try:
                yield Workplace(folder, hub, address)
            finally:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(str(address))
                    connection.sendall(b"{}\n")


def change_package(package: Path, blocks: Sequence[Block]) -> None:
    """Write the files and apply the changes that documents add to the package."""
    for block in blocks:
        if block.changes_package:
            path = package / block.file
            before = path.read_text(encoding="utf-8") if block.language == "diff" else ""
            path.write_text(apply_diff(before, block.text) if before else block.text, encoding="utf-8")


def write_commands(folder: Path, address: Path, seconds: Path) -> None:
    """A newcomer's virtual environment."""
    folder.mkdir(parents=True)
    shim = Path(__file__).with_name("shim.py")
    for name in COMMANDS:
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{shim}" "{address}" "{seconds}" {name} "$@"\n')
        path.chmod(0o755)
    (folder / "activate").write_text("VIRTUAL_ENV=.venv\n")


def write_class_folders(folder: Path) -> None:
    """Noise pictures in one folder a class."""
    for number in range(IMAGES):
        path = folder / CLASSES[number % len(CLASSES)] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number, SIDE))


def fill(hub: LoopbackHub, folder: Path) -> None:
    """What the documents load from the Hub, in small."""
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    models: dict[str, PreTrainedModel] = {
        "facebook/deit-tiny-patch16-224": ViTForImageClassification(ViTConfig(**_SIZES, **labels)),
        "facebook/dino-vits16": ViTModel(ViTConfig(**_SIZES), add_pooling_layer=False),
        "google/vit-base-patch16-224": ViTForImageClassification(ViTConfig(**_SIZES, **labels)),
        "facebook/vit-msn-small": ViTMSNModel(ViTMSNConfig(**_SIZES)),
    }
    torch.manual_seed(0)
    for name, model in models.items():
        model.eval().save_pretrained(folder / name)
        build_image_processor(_SIZES["image_size"], [0.5] * 3, [0.25] * 3).save_pretrained(folder / name)
        hub.add(name, folder / name)
    data = folder / "imagenet" / "data"
    data.mkdir(parents=True)
    for split in ("train", "validation"):
        write_images(data / f"{split}-00000-of-00001.parquet", IMAGES)
    hub.add("datasets/ILSVRC/imagenet-1k", folder / "imagenet")
