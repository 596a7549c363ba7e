"""Block masks: against a loop over patches, their sizes, and what they depend on."""

import math

import numpy as np
import pytest

from hf_simprune.dino.augmentation import MASKS_DOMAIN, AugmentationConfig, philox
from hf_simprune.dino.crops import make_views
from hf_simprune.dino.dinov2.masking import BlockMasking, check_mask_ratios, draw_masks, mask_blocks
from hf_simprune.errors import InputError

from ..image_files import encode, pixels


def naive_mask(rows, columns, wanted, generator):
    """BEiT's blocks, patch by patch."""
    masked, drawing = set(), True
    while len(masked) < wanted and drawing:
        drawing = False
        for u_area, u_aspect, u_row, u_column in generator.random((10, 4)).tolist():
            left = wanted - len(masked)
            area = min(4, left) + (min(left, max(4, rows * columns // 2)) - min(4, left)) * u_area
            aspect = math.exp(math.log(0.3) + u_aspect * (math.log(1 / 0.3) - math.log(0.3)))
            height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if height < 1 or width < 1 or height > rows or width > columns:
                continue
            top, left_edge = int(u_row * (rows - height + 1)), int(u_column * (columns - width + 1))
            block = {(top + y, left_edge + x) for y in range(height) for x in range(width)}
            if 0 < len(block - masked) <= left:
                masked |= block
                drawing = True
                break
    return masked


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (3, 7), (2, 2)])
def test_masks_equal_a_loop_over_patches(grid):
    for key in range(40):
        wanted = int(0.05 * key / 2 * grid[0] * grid[1] * 0.95)
        mask = np.zeros(grid, dtype=bool)
        mask_blocks(mask, wanted, philox(1, 2, key))
        expected = naive_mask(*grid, wanted, philox(1, 2, key))
        assert {tuple(place) for place in np.argwhere(mask).tolist()} == expected
        assert mask.sum() <= wanted


def test_masked_shares_lie_between_the_ratios_and_probability_is_met():
    settings = BlockMasking((14, 14), 0.1, 0.5, 0.5)
    counts = np.concatenate([draw_masks(settings, philox(0, 0, key)).sum(1) for key in range(400)])
    assert 0.45 < (counts > 0).mean() < 0.55
    masked = counts[counts > 0] / 196
    assert masked.max() <= 0.5 and settings.most_masked == 98
    assert (masked >= 0.09).mean() > 0.95  # a block or two may not fit any more
    assert abs(masked.mean() - 0.3) < 0.03
    assert masked.std() > 0.08


def test_masks_are_blocks():
    mask = draw_masks(BlockMasking((14, 14), 0.4, 0.4, 1.0), philox(0, 0, 1))[0].reshape(14, 14)
    alike = (mask[:, 1:] == mask[:, :-1]).mean()
    assert alike > 0.8  # scattered patches at this share would agree with their neighbours in 52 %


@pytest.mark.parametrize("ratio", [0.0, 0.9])
def test_extreme_ratios(ratio):
    counts = [draw_masks(BlockMasking((4, 4), ratio, ratio, 1.0), philox(0, 0, key)).sum(1) for key in range(30)]
    assert np.max(counts) <= int(16 * ratio) and np.min(counts) >= 0
    if ratio:
        assert np.mean(counts) > 11


def test_probability_nought_masks_nothing_and_one_every_view():
    assert not any(draw_masks(BlockMasking((8, 8), probability=0.0), philox(0, 0, key)).any() for key in range(20))
    assert all(draw_masks(BlockMasking((8, 8), probability=1.0), philox(0, 0, key)).any(1).all() for key in range(20))


def test_masks_depend_on_seed_epoch_and_key_alone_and_change_no_crop():
    plain = AugmentationConfig(16, 8, local_crops_number=1)
    masking = BlockMasking((4, 4), 0.3, 0.5, 1.0)
    with_masks = AugmentationConfig(16, 8, local_crops_number=1, masking=masking)
    image = encode(pixels(0, 20, 24))
    views, masked = (make_views(image, cfg, 5, 1, 7) for cfg in (plain, with_masks))
    assert views["masks"] is None and masked["masks"].shape == (2, 16)
    assert np.array_equal(masked["masks"].numpy(), draw_masks(masking, philox(5, 1, 7, MASKS_DOMAIN)))
    assert views["global_crops"].equal(masked["global_crops"]) and views["local_crops"].equal(masked["local_crops"])
    drawn = [make_views(image, with_masks, *where)["masks"] for where in ((5, 1, 7), (6, 1, 7), (5, 2, 7), (5, 1, 8))]
    assert drawn[0].equal(masked["masks"]) and not any(drawn[0].equal(other) for other in drawn[1:])


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ((0.1, 1.0), r"--mask_ratio_max 1: must be from 0 up to, not including, 1"),
        ((-0.1, 0.5), r"--mask_ratio_min -0.1: must be from 0"),
        ((float("nan"), 0.5), r"--mask_ratio_min nan"),
        ((0.6, 0.5), r"--mask_ratio_min 0.6 is above --mask_ratio_max 0.5"),
    ],
)
def test_ratios_outside_their_range_are_refused(ratios, message):
    with pytest.raises(InputError, match=message):
        check_mask_ratios(*ratios)
