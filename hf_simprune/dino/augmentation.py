# SPDX-License-Identifier: Apache-2.0
"""Every random choice of DINO's multi-crop augmentation, drawn once per example and nowhere else.

The recipe (crop areas, colour jitter, blur, solarisation and their probabilities) is the one of facebookresearch/dino
(Caron et al., 2021, arXiv:2104.14294, after BYOL); crops follow torchvision's `RandomResizedCrop`. The choices are a
pure function of (seed, epoch, example key, image size), so they depend on no rank, worker or batch.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .dinov2.masking import BlockMasking


GLOBAL_VIEWS = 2
JITTER_OPS = ("brightness", "contrast", "saturation", "hue")
SOLARIZE_THRESHOLD = 128
BLUR_SIGMA = (0.1, 2.0)

_LOG_RATIO = (float(np.log(3 / 4)), float(np.log(4 / 3)))
_CROP_TRIES = 10
# Last word of the Philox counter: keeps the streams of crops, of the epoch's order, of masks and of `draw` apart.
_CROPS_DOMAIN, _ORDER_DOMAIN, MASKS_DOMAIN, DRAW_DOMAIN = 0, 1, 2, 3


@dataclass(frozen=True)
class AugmentationConfig:
    """Published values of DINO's multi-crop augmentation, all of them settings.

    Sizes are pixels, scales are (smallest, largest) parts of the image's area, probabilities lie in [0, 1],
    `color_jitter` is (brightness, contrast, saturation, hue) with hue in turns of the colour circle (at most 0.5).
    `blur_prob` and `solarize_prob` are (first global crop, second global crop, local crops). `masking` is that of the
    student's global crops, None for no masks.
    """

    global_crop_size: int = 224
    local_crop_size: int = 96
    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    local_crops_number: int = 8
    hflip_prob: float = 0.5
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    color_jitter_prob: float = 0.8
    grayscale_prob: float = 0.2
    blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5)
    solarize_prob: tuple[float, float, float] = (0.0, 0.2, 0.0)
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    masking: BlockMasking | None = None

    @property
    def num_views(self) -> int:
        """Global and local crops together (V)."""
        return GLOBAL_VIEWS + self.local_crops_number


def philox(seed: int, epoch: int, key: int, domain: int = _CROPS_DOMAIN) -> np.random.Generator:
    """Counter-based generator of one example: distinct (seed, epoch, key) give streams that never overlap."""
    # A zero counter word in front leaves 2**64 blocks to each stream.
    words = np.array([0, key % 2**64, 0, domain], dtype=np.uint64)
    return np.random.Generator(
        np.random.Philox(counter=words, key=np.array([seed % 2**64, epoch % 2**64], dtype=np.uint64))
    )


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The order of an epoch: (num_examples,) int64 permutation, a function of (seed, epoch) alone."""
    return philox(seed, epoch, 0, domain=_ORDER_DOMAIN).permutation(num_examples)


@dataclass(frozen=True)
class _ViewTable:
    """The config spread over views: low end and width of every uniform range, one row a view."""

    scale_low: np.ndarray  # (V, 1)
    scale_width: np.ndarray  # (V, 1)
    probability: np.ndarray  # (V, 5): flip, jitter, grayscale, blur, solarise
    factor_low: np.ndarray  # (4,)
    factor_width: np.ndarray  # (4,)


@lru_cache(maxsize=8)
def _view_table(cfg: AugmentationConfig) -> _ViewTable:
    kinds = np.minimum(np.arange(cfg.num_views), GLOBAL_VIEWS)
    scales = np.array([cfg.global_crops_scale] * GLOBAL_VIEWS + [cfg.local_crops_scale])[kinds]
    probability = np.empty((cfg.num_views, 5))
    probability[:, :3] = (cfg.hflip_prob, cfg.color_jitter_prob, cfg.grayscale_prob)
    probability[:, 3] = np.array(cfg.blur_prob)[kinds]
    probability[:, 4] = np.array(cfg.solarize_prob)[kinds]
    strength = np.array(cfg.color_jitter)
    low = np.maximum(1 - strength, 0)
    low[3] = -strength[3]
    high = 1 + strength
    high[3] = strength[3]
    return _ViewTable(scales[:, :1], scales[:, 1:] - scales[:, :1], probability, low, high - low)


def _fallback_box(width: int, height: int) -> tuple[int, int]:
    """Largest crop (width, height) with an allowed aspect ratio, used when no try fits."""
    ratio = np.log(width / height)
    if ratio < _LOG_RATIO[0]:
        return width, min(height, round(width / np.exp(_LOG_RATIO[0])))
    if ratio > _LOG_RATIO[1]:
        return min(width, round(height * np.exp(_LOG_RATIO[1]))), height
    return width, height


def _crop_boxes(
    tries: np.ndarray, corner: np.ndarray, scale_low: np.ndarray, scale_width: np.ndarray, width: int, height: int
) -> np.ndarray:
    """Boxes (V, 4) of x0, y0, x1, y1 from uniforms `tries` (V, 2, tries) and `corner` (V, 2)."""
    area = (scale_low + scale_width * tries[:, 0]) * (width * height)
    log_ratio = _LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * tries[:, 1]
    # sqrt(area·ratio) and sqrt(area/ratio) share one exponential
    root_ratio = np.exp(0.5 * log_ratio)
    side = np.sqrt(area)
    widths = np.rint(side * root_ratio)
    heights = np.rint(side / root_ratio)
    fits = (widths <= width) & (heights <= height) & (widths > 0) & (heights > 0)
    views = np.arange(len(tries))
    first = fits.argmax(axis=1)
    box_width, box_height = widths[views, first], heights[views, first]
    left = np.floor(corner[:, 0] * (width - box_width + 1))
    top = np.floor(corner[:, 1] * (height - box_height + 1))
    if not fits[views, first].all():
        failed = ~fits[views, first]
        box_width[failed], box_height[failed] = _fallback_box(width, height)
        left[failed] = (width - box_width[failed]) // 2
        top[failed] = (height - box_height[failed]) // 2
    return np.stack([left, top, left + box_width, top + box_height], axis=1).astype(np.int64)


def sample_parameters(
    cfg: AugmentationConfig, seed: int, epoch: int, key: int, width: int, height: int
) -> dict[str, np.ndarray]:
    """All random parameters of the V = 2 + local_crops_number views of one example; row v belongs to view v.

    Returns `boxes` (V, 4) int64 pixels x0, y0, x1, y1 within the image; `flip`, `jitter`, `grayscale`, `solarize` (V,)
    bool; `factors` (V, 4) float32: brightness, contrast and saturation factors and the hue shift in turns; `order`
    (V, 4) int8: the jitter operations (indices into `JITTER_OPS`) in the order in which they are applied;
    `blur_sigma` (V,) float32 pixels, 0 where there is no blur.
    """
    table = _view_table(cfg)
    draws = philox(seed, epoch, key).random((cfg.num_views, 2 * _CROP_TRIES + 16))
    tries = draws[:, : 2 * _CROP_TRIES].reshape(-1, 2, _CROP_TRIES)
    draws = draws[:, 2 * _CROP_TRIES :]
    chosen = draws[:, 2:7] < table.probability
    sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * draws[:, 15]
    return {
        "boxes": _crop_boxes(tries, draws[:, :2], table.scale_low, table.scale_width, width, height),
        "flip": chosen[:, 0],
        "jitter": chosen[:, 1],
        "factors": (table.factor_low + table.factor_width * draws[:, 7:11]).astype(np.float32),
        "order": draws[:, 11:15].argsort(axis=1).astype(np.int8),
        "grayscale": chosen[:, 2],
        "blur_sigma": (sigma * chosen[:, 3]).astype(np.float32),
        "solarize": chosen[:, 4],
    }
