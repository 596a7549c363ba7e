# SPDX-License-Identifier: Apache-2.0
"""Encoded bytes in, uint8 crops out: one decoding an image, one resampling a crop.

Crops are resampled by torch's antialiased bicubic kernel for uint8, which is faster than
`PIL.Image.crop(box).resize(size, BICUBIC)` and agrees with it within two levels of 255.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..data.decoding import load_pixels, open_image, oriented_size
from .augmentation import DRAW_DOMAIN, GLOBAL_VIEWS, MASKS_DOMAIN, AugmentationConfig, philox, sample_parameters
from .dinov2.masking import BlockMasking, draw_masks


_DRAFT_FACTORS = (8, 4, 2)


def draft_factor(boxes: np.ndarray, sizes: np.ndarray) -> int:
    """Largest factor 8, 4, 2 or 1 by which a JPEG may be decoded smaller without up-sampling a crop by it.

    `boxes` (V, 4) x0, y0, x1, y1; `sizes` (V,) output sides in pixels.
    """
    shorter = np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    return next((factor for factor in _DRAFT_FACTORS if (shorter >= factor * sizes).all()), 1)


def output_sizes(cfg: AugmentationConfig) -> np.ndarray:
    """(V,) side of every view's crop."""
    return np.array([cfg.global_crop_size] * GLOBAL_VIEWS + [cfg.local_crop_size] * cfg.local_crops_number)


def cut_crops(pixels: Tensor, boxes: np.ndarray, size: int) -> Tensor:
    """Crops uint8 (V, 3, size, size) of pixels (H, W, 3): whole-pixel `boxes` (V, 4), bicubic with antialiasing."""
    planes = pixels.permute(2, 0, 1).unsqueeze(0)
    out = torch.empty(len(boxes), 3, size, size, dtype=torch.uint8)
    for crop, (left, top, right, bottom) in zip(out, boxes.tolist()):
        part = planes[:, :, top:bottom, left:right]
        crop.copy_(functional.interpolate(part, (size, size), mode="bicubic", antialias=True)[0])
    return out


def make_views(image: bytes | Tensor, cfg: AugmentationConfig, seed: int, epoch: int, key: int) -> dict[str, Any]:
    """All crops of one image and the parameters of their photometric part.

    `image` is encoded bytes or decoded pixels uint8 (H, W, 3). Returns `sample_parameters` of (seed, epoch, key)
    without its boxes, `global_crops` uint8 (2, 3, H, W), `local_crops` uint8 (L, 3, h, w) or None, `masks` bool
    (2, N) or None and `draw`, a random number of 63 bits. Raises one of DECODING_ERRORS when the bytes cannot be read.
    """
    if isinstance(image, Tensor):
        parameters = sample_parameters(cfg, seed, epoch, key, image.shape[1], image.shape[0])
        boxes, pixels = parameters.pop("boxes"), image
    else:
        opened = open_image(image)
        width, height, orientation = oriented_size(opened)
        parameters = sample_parameters(cfg, seed, epoch, key, width, height)
        boxes = parameters.pop("boxes")
        factor = draft_factor(boxes, output_sizes(cfg)) if opened.format == "JPEG" else 1
        if factor > 1:
            opened.draft("RGB", (opened.width // factor, opened.height // factor))
        pixels = load_pixels(opened, orientation)
        if pixels.shape[1] != width or pixels.shape[0] != height:
            boxes = _rescale_boxes(boxes, pixels.shape[1] / width, pixels.shape[0] / height)
    local = None
    if cfg.local_crops_number:
        local = cut_crops(pixels, boxes[GLOBAL_VIEWS:], cfg.local_crop_size)
    return {
        **parameters,
        "global_crops": cut_crops(pixels, boxes[:GLOBAL_VIEWS], cfg.global_crop_size),
        "local_crops": local,
        "masks": None if cfg.masking is None else _masks(cfg.masking, seed, epoch, key),
        "draw": int(philox(seed, epoch, key, DRAW_DOMAIN).integers(2**63)),
    }


def _masks(masking: BlockMasking, seed: int, epoch: int, key: int) -> Tensor:
    return torch.from_numpy(draw_masks(masking, philox(seed, epoch, key, MASKS_DOMAIN), GLOBAL_VIEWS))


def _rescale_boxes(boxes: np.ndarray, horizontal: float, vertical: float) -> np.ndarray:
    """Boxes of the full image in a reduced one, to the nearest whole pixel."""
    return np.rint(boxes * np.array([horizontal, vertical, horizontal, vertical])).astype(np.int64)
