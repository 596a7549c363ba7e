# SPDX-License-Identifier: Apache-2.0
"""Scenes with masks for the segmentation benchmarks."""

from dataclasses import dataclass

import pyarrow.parquet
import torch
from _rba import DecodedImages, read_table
from transformers.image_processing_utils import BaseImageProcessor

from hf_simprune.data.decoding import decode_image, image_size
from hf_simprune.evaluation.segmentation import whole_patches


@dataclass(frozen=True)
class Scenes:
    """Images and masks (N, H, W), the first `train` of them for training; class `ignore` does not count."""

    reader: DecodedImages
    masks: torch.Tensor
    train: int
    grid: tuple[int, int]
    ignore: int


def load_scenes(path: str, processor: BaseImageProcessor, patch: tuple[int, int], limit: int | None) -> Scenes:
    """Decode images to whole patches and masks as they are; train rows first."""
    table = read_table(path)
    encoded = pyarrow.parquet.read_table(path, columns=["mask"])["mask"].to_pylist()
    train, test = table.rows("train")[:limit], [row for row, part in enumerate(table.part) if part != "train"][:limit]
    width, height = image_size(table.cells[train[0]])
    size = whole_patches(height, width, patch)
    rows = [*train, *test]
    return Scenes(
        DecodedImages([table.cells[row] for row in rows], processor, size),
        torch.stack([decode_image(encoded[row])[..., 0] for row in rows]),
        len(train),
        (size[0] // patch[0], size[1] // patch[1]),
        len(table.class_names) - 1,
    )
