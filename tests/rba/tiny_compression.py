"""Checkpoints and command lines small enough to analyse and compress in a test."""

import os
import sys
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_simprune.evaluation.features import build_image_processor

from ..tiny_run import ROOT


DEPTH = 6
IMAGE_SIZE = 16
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": IMAGE_SIZE,
    "patch_size": 4,
}
CLI = [sys.executable, "-m", "hf_simprune.cli"]


def vit(depth: int = DEPTH, classes: int = 4) -> ViTForImageClassification:
    # the default initialisation is so small that blocks do nearly nothing
    config = ViTConfig(**{**SIZES, "num_hidden_layers": depth}, num_labels=classes, initializer_range=0.3)
    return ViTForImageClassification(config)


def dinov2() -> Dinov2Model:
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    return Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2, initializer_range=0.3))


def clip() -> CLIPModel:
    text = CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=CLIPVisionConfig(**SIZES).to_dict(), projection_dim=12)
    )


def save_checkpoint(folder: Path, model: PreTrainedModel | None = None, seed: int = 0) -> str:
    """A random model with its image processor, as `save_pretrained` writes them; by default an image classifier."""
    torch.manual_seed(seed)
    model = vit() if model is None else model
    model.eval().save_pretrained(folder)
    build_image_processor(IMAGE_SIZE, [0.5] * 3, [0.25] * 3).save_pretrained(folder)
    return str(folder)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def environment() -> dict[str, str]:
    """For a process of its own, on the CPU and with one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
