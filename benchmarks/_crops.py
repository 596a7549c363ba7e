# SPDX-License-Identifier: Apache-2.0
"""Pairs of crops whose boxes and flips are known, and where their patches lie in the source image."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow.parquet
import torch
from torch import Tensor

from hf_simprune.data.decoding import decode_image
from hf_simprune.data.loading import encoded_bytes
from hf_simprune.dino.augmentation import GLOBAL_VIEWS, AugmentationConfig, sample_parameters
from hf_simprune.dino.crops import cut_crops


class CropPairs(NamedTuple):
    """Two crops of each of B images.

    pixels: (2B, 3, size, size) fp32, normalised, view-major. boxes: (2B, 4) fp64 x0, y0, x1, y1 in pixels of the
    source image. flips: (2B,) bool, whether a crop is mirrored left to right.
    """

    pixels: Tensor
    boxes: Tensor
    flips: Tensor


def crop_pairs(encoded: Sequence[bytes], keys: Sequence[int], config: AugmentationConfig, seed: int) -> CropPairs:
    """The two global crops that training would cut from each image in its first epoch, mirrored as there.

    Colours are left alone, so that what is compared is the place and nothing else. `keys` are the images' numbers:
    crops depend on seed and key, not on the batch.
    """
    pixels, boxes, flips = [], [], []
    for cell, key in zip(encoded, keys, strict=True):
        image = decode_image(cell)
        drawn = sample_parameters(config, seed, 0, key, image.shape[1], image.shape[0])
        boxes.append(drawn["boxes"][:GLOBAL_VIEWS])
        flips.append(drawn["flip"][:GLOBAL_VIEWS])
        pixels.append(cut_crops(image, boxes[-1], config.global_crop_size))
    flipped = torch.from_numpy(np.stack(flips, axis=1)).flatten()
    crops = torch.stack(pixels, dim=1).flatten(0, 1).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.image_mean, config.image_std))
    crops = torch.where(flipped[:, None, None, None], crops.flip(-1), crops)
    return CropPairs((crops - mean) / std, torch.from_numpy(np.stack(boxes, axis=1)).flatten(0, 1).double(), flipped)


def patch_boxes(boxes: Tensor, flips: Tensor, grid: tuple[int, int]) -> Tensor:
    """Where patches lie in the source: boxes (R, 4) and flips (R,) of crops to (R, rows * columns, 4), row-major."""
    rows, columns = grid
    x0, y0, x1, y1 = boxes.unsqueeze(-1).unbind(1)
    column = torch.arange(columns, dtype=boxes.dtype).expand(len(boxes), columns)
    column = torch.where(flips[:, None], columns - 1 - column, column)
    row = torch.arange(rows, dtype=boxes.dtype).expand(len(boxes), rows)
    left, top = x0 + column * (x1 - x0) / columns, y0 + row * (y1 - y0) / rows
    right, bottom = left + (x1 - x0) / columns, top + (y1 - y0) / rows
    by_row = [edge.unsqueeze(2).expand(-1, rows, columns).flatten(1) for edge in (top, bottom)]
    by_column = [edge.unsqueeze(1).expand(-1, rows, columns).flatten(1) for edge in (left, right)]
    return torch.stack([by_column[0], by_row[0], by_column[1], by_row[1]], dim=-1)


def overlap_areas(a: Tensor, b: Tensor) -> Tensor:
    """Common area of every two boxes, (R, N, 4) and (R, M, 4) to (R, N, M); 0 where they only touch."""
    a, b = a.unsqueeze(2), b.unsqueeze(1)
    width = torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])
    height = torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])
    # a sliver of rounding is no overlap
    least = 1e-9 * (a[..., 2] - a[..., 0])
    return torch.where((width > least) & (height > least), width * height, 0.0)


def areas(boxes: Tensor) -> Tensor:
    """(…,) areas of boxes (…, 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def weighted_iou(weights_a: Tensor, weights_b: Tensor, boxes_a: Tensor, boxes_b: Tensor, overlap: Tensor) -> Tensor:
    """How far two views keep the same places: (R,) integral of the smaller over integral of the larger weight.

    Every point of the source image has in each view the weight of the patch it lies in, 0 outside of the crop. With
    weights of 0 and 1 this is the intersection over union of the kept areas. The patches of a view do not overlap
    one another, so the integral of the smaller weight is a sum over pairs of patches.

    Args:
        weights_a, weights_b: (R, N) and (R, M), at least 0.
        boxes_a, boxes_b: (R, N, 4) and (R, M, 4), of `patch_boxes`.
        overlap: (R, N, M), of `overlap_areas`.
    """
    smaller = (torch.minimum(weights_a.unsqueeze(2), weights_b.unsqueeze(1)) * overlap).sum((1, 2))
    total = (weights_a * areas(boxes_a)).sum(1) + (weights_b * areas(boxes_b)).sum(1)
    return smaller / (total - smaller)


def read_images(path: str, limit: int | None = None, column: str = "image") -> list[bytes]:
    """Encoded images of a parquet file, the first `limit` of them."""
    table = pyarrow.parquet.read_table(path, columns=[column])
    return [encoded_bytes(cell) for cell in table[column].slice(0, limit).to_pylist()]
