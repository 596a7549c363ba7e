"""Runs small enough for a test: random pictures, a network of four narrow blocks, a few steps."""

import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.nn import functional


ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "train_dino.py"
NUM_IMAGES = 40
BATCH = 8
OPTIONS: dict[str, Any] = {
    "architecture": "vit_micro",
    "config_overrides": "hidden_size=24,num_hidden_layers=4,num_attention_heads=2,intermediate_size=48",
    "image_size": 16,
    "patch_size": 4,
    "local_crops_number": 2,
    "local_crop_size": 12,
    "out_dim": 32,
    "head_hidden_dim": 16,
    "head_bottleneck_dim": 8,
    "per_device_train_batch_size": BATCH,
    "max_steps": 6,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 2,
    "knn_k": 5,
    "disable_tqdm": True,
}
# Of a line of metrics.jsonl, what depends on the machine's mood.
TIMING = {"images_per_second", "data_wait", "compute"}


def png(seed: int, size: int = 16, mode: str = "RGB") -> bytes:
    """A noise picture whose brightness hints at its class, seed % 4."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 128, (size, size, 3), dtype=np.uint8) + np.uint8(4 * (seed % 4))
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format="PNG")
    return buffer.getvalue()


def write_images(
    path: Path, count: int = NUM_IMAGES, broken: Sequence[int] = (), first: int = 0, **columns: list
) -> str:
    """A parquet file of `count` pictures from `png(first)` on, with labels, some of the pictures broken."""
    images = [{"bytes": b"no picture" if i in broken else png(first + i), "path": None} for i in range(count)]
    pq.write_table(pa.table({"image": images, "label": [i % 4 for i in range(count)], **columns}), path)
    return str(path)


def words(**options: Any) -> list[str]:
    """`OPTIONS`, changed, as a command line; `None` leaves one out."""
    line = []
    for name, value in {**OPTIONS, **options}.items():
        if value is not None:
            line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def command(**options: Any) -> list[str]:
    return [sys.executable, str(RECIPE), *words(**options)]


def environment(**changes: str) -> dict[str, str]:
    """For a process of its own, on the CPU and with one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **changes}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl without the values that differ from run to run."""
    return [{key: value for key, value in record.items() if key not in TIMING} for record in metrics(folder)]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in metrics(folder) if "loss" in record]


def naive_knn(bank: torch.Tensor, labels: list[int], queries: torch.Tensor, k: int, temperature: float) -> list[int]:
    """Weighted k-NN, one query at a time."""
    predictions = []
    for query in queries:
        cosines = [functional.cosine_similarity(query, row, dim=0).item() for row in bank]
        votes: dict[int, float] = {}
        for i in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]:
            votes[labels[i]] = votes.get(labels[i], 0.0) + float(np.exp(cosines[i] / temperature))
        predictions.append(max(votes, key=votes.get))
    return predictions
