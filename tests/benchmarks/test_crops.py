"""Where patches lie in the source image, and how much of it two views share."""

import io

import _crops
import numpy as np
import pytest
import torch
from PIL import Image

from hf_simprune.dino.augmentation import AugmentationConfig


GRID = (3, 4)


def coordinate_image(width: int, height: int) -> bytes:
    """A picture whose red is a pixel's column and whose green is its row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def test_patches_lie_where_the_crops_show_them():
    """The mean colour of a patch is the middle of its box, in crops that are mirrored and in those that are not."""
    config = AugmentationConfig(
        global_crop_size=32, local_crops_number=0, image_mean=(0, 0, 0), image_std=(1, 1, 1), hflip_prob=0.5
    )
    pairs = _crops.crop_pairs([coordinate_image(200, 160)] * 6, range(6), config, seed=0)
    assert 0 < pairs.flips.sum() < 12
    boxes = _crops.patch_boxes(pairs.boxes, pairs.flips, (4, 4))
    shown = torch.nn.functional.avg_pool2d(pairs.pixels[:, :2] * 255, 8).flatten(2).transpose(1, 2)
    middles = (boxes[..., :2] + boxes[..., 2:]) / 2 - 0.5  # pixel 0 is the interval from 0 to 1
    assert (shown - middles).abs().max() < 1.5
    assert (boxes[:, 0, :2] - boxes[:, 3, :2]).abs().amax() > 10


def test_crops_do_not_depend_on_the_batch_they_are_cut_in():
    config = AugmentationConfig(global_crop_size=16, local_crops_number=0)
    images = [coordinate_image(40, 30), coordinate_image(50, 60)]
    both = _crops.crop_pairs(images, [0, 1], config, seed=3)
    alone = _crops.crop_pairs(images[1:], [1], config, seed=3)
    assert torch.equal(both.pixels[[1, 3]], alone.pixels) and torch.equal(both.boxes[[1, 3]], alone.boxes)


def views() -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of two crops of three images, in whole pixels: overlapping, apart, and one within the other."""
    first = torch.tensor([[0, 0, 16, 9], [0, 0, 8, 6], [4, 3, 24, 18]]).double()
    second = torch.tensor([[6, 4, 18, 16], [8, 6, 16, 12], [8, 6, 12, 9]]).double()
    flips = torch.tensor([False, True, True])
    return _crops.patch_boxes(first, flips, GRID), _crops.patch_boxes(second, ~flips, GRID)


def raster(boxes: torch.Tensor, weights: torch.Tensor) -> np.ndarray:
    """The weight at the middle of every whole pixel of a source of 24 x 24, one pixel at a time."""
    picture = np.zeros((24, 24))
    for row in range(24):
        for column in range(24):
            for (x0, y0, x1, y1), weight in zip(boxes.tolist(), weights.tolist()):
                if x0 < column + 0.5 < x1 and y0 < row + 0.5 < y1:
                    picture[row, column] = weight
    return picture


def test_overlap_areas_count_the_common_pixels():
    first, second = views()
    areas = _crops.overlap_areas(first, second)
    for image in range(3):
        for a in range(12):
            for b in range(12):
                one = torch.ones(1)
                common = raster(first[image, a : a + 1], one) * raster(second[image, b : b + 1], one)
                assert areas[image, a, b].item() == pytest.approx(common.sum())
    assert (areas[1] == 0).all()  # they touch in a corner


@pytest.mark.parametrize("fractional", [False, True])
def test_weighted_iou_is_that_of_the_rasters(fractional):
    first, second = views()
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 3, 12, generator=generator).double()
    weights = weights if fractional else (weights > 0.4).double()
    found = _crops.weighted_iou(*weights, first, second, _crops.overlap_areas(first, second))
    for image in range(3):
        a, b = raster(first[image], weights[0, image]), raster(second[image], weights[1, image])
        assert found[image].item() == pytest.approx(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def test_equal_views_that_keep_everything_have_an_iou_of_one():
    boxes = views()[0]
    everything = torch.ones(3, 12, dtype=torch.float64)
    found = _crops.weighted_iou(everything, everything, boxes, boxes, _crops.overlap_areas(boxes, boxes))
    torch.testing.assert_close(found, torch.ones(3, dtype=torch.float64))
