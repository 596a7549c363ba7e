# SPDX-License-Identifier: Apache-2.0
"""Block masks for the student's global views (BEiT, arXiv:2106.08254; DINOv2, arXiv:2304.07193), a view at a time.

DINOv2 deals mask ratios out over a batch; here every view draws its own, so that a mask depends on no batch.
"""

import math
from dataclasses import dataclass

import numpy as np

from ...errors import InputError


SMALLEST_BLOCK = 4
LOG_ASPECT = math.log(1 / 0.3)
_TRIES = 10


@dataclass(frozen=True)
class BlockMasking:
    """How global views of `grid` patches (rows, columns) are masked.

    A view is masked with `probability`; it then aims at a share of its patches drawn evenly from `ratio_min` to
    `ratio_max`, and never exceeds it.
    """

    grid: tuple[int, int]
    ratio_min: float = 0.1
    ratio_max: float = 0.5
    probability: float = 0.5

    @property
    def most_masked(self) -> int:
        """Largest number of masked patches of a view."""
        return wanted_patches(self.grid, self.ratio_max)


def check_mask_ratios(ratio_min: float, ratio_max: float) -> None:
    """Raise InputError unless 0 <= ratio_min <= ratio_max < 1."""
    for option, ratio in (("mask_ratio_min", ratio_min), ("mask_ratio_max", ratio_max)):
        if not 0 <= ratio < 1:
            raise InputError(f"--{option} {ratio:g}: must be from 0 up to, not including, 1")
    if ratio_min > ratio_max:
        raise InputError(
            f"--mask_ratio_min {ratio_min:g} is above --mask_ratio_max {ratio_max:g}: give the smaller one first"
        )


def wanted_patches(grid: tuple[int, int], ratio: float) -> int:
    """Patches that a mask of this ratio aims at: floor(ratio * patches)."""
    # Without the slack 0.7 * 10 = 6.999... would aim at 6.
    return math.floor(ratio * grid[0] * grid[1] + 1e-9)


def draw_masks(settings: BlockMasking, generator: np.random.Generator, views: int = 2) -> np.ndarray:
    """Masks bool (views, patches), row by row of the grid; True is masked. The views draw one after the other."""
    masks = np.zeros((views, *settings.grid), dtype=bool)
    for mask in masks:
        chosen, ratio = generator.random(2)
        if chosen < settings.probability:
            share = settings.ratio_min + (settings.ratio_max - settings.ratio_min) * ratio
            mask_blocks(mask, wanted_patches(settings.grid, share), generator)
    return masks.reshape(views, -1)


def mask_blocks(mask: np.ndarray, wanted: int, generator: np.random.Generator) -> None:
    """Mask blocks in `mask` (rows, columns), in place, until `wanted` patches are masked or no block fits.

    A block's area is drawn evenly from 4 patches, or what is left to mask where that is less, to what is left, but at
    most half the grid; its aspect ratio evenly on a logarithmic scale from 0.3 to 1 / 0.3. A block that does not fit
    into the grid, masks nothing new or too much is drawn again, ten times at most. A try is four uniform numbers:
    area, aspect ratio, row, column.
    """
    rows, columns = mask.shape
    left = wanted
    while left > 0:
        for area, aspect, down, right in generator.random((_TRIES, 4)):
            most = min(left, max(SMALLEST_BLOCK, rows * columns // 2))
            least = min(SMALLEST_BLOCK, left)
            size = least + (most - least) * area
            ratio = math.exp(LOG_ASPECT * (2 * aspect - 1))
            height, width = round(math.sqrt(size * ratio)), round(math.sqrt(size / ratio))
            if not (0 < height <= rows and 0 < width <= columns):
                continue
            top, start = int(down * (rows - height + 1)), int(right * (columns - width + 1))
            block = mask[top : top + height, start : start + width]
            new = height * width - int(block.sum())
            if 0 < new <= left:
                block[:] = True
                left -= new
                break
        else:
            return
