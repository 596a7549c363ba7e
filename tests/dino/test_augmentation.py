# SPDX-License-Identifier: Apache-2.0
"""The random choices: what they follow, what they depend on, and how they are spread."""

import math

import numpy as np
import pytest

from hf_simprune.dino.augmentation import (
    AugmentationConfig,
    _crop_boxes,
    epoch_order,
    sample_parameters,
)


TABLE_SIZE = 600


def many(cfg: AugmentationConfig, width: int = 320, height: int = 240, epoch: int = 0) -> dict[str, np.ndarray]:
    examples = [sample_parameters(cfg, 7, epoch, key, width, height) for key in range(TABLE_SIZE)]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def naive_box(tries, corner, scale, width, height):
    """RandomResizedCrop as torchvision documents it, one view, with the uniforms given."""
    low, high = math.log(3 / 4), math.log(4 / 3)
    for area_draw, ratio_draw in zip(*tries):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area_draw)
        ratio = math.exp(low + (high - low) * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(corner[0] * (width - w + 1)), int(corner[1] * (height - h + 1))
            return [left, top, left + w, top + h]
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    left, top = (width - w) // 2, (height - h) // 2
    return [left, top, left + w, top + h]


@pytest.mark.parametrize("size", [(320, 240), (240, 240), (32, 32), (8, 8), (1, 1), (900, 60), (60, 900)])
def test_boxes_follow_random_resized_crop(size):
    rng = np.random.default_rng(0)
    scales = np.array([(0.4, 1.0), (0.05, 0.4), (1.0, 1.0)] * 100)
    tries, corner = rng.random((300, 2, 10)), rng.random((300, 2))
    boxes = _crop_boxes(tries, corner, scales[:, :1], scales[:, 1:] - scales[:, :1], *size)
    assert boxes.tolist() == [naive_box(*row, *size) for row in zip(tries, corner, scales)]


def test_the_same_example_gets_the_same_parameters_and_another_does_not():
    cfg = AugmentationConfig(local_crops_number=2)
    first = sample_parameters(cfg, 1, 2, 3, 64, 64)
    again = sample_parameters(cfg, 1, 2, 3, 64, 64)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not np.array_equal(first["factors"], sample_parameters(cfg, *other, 64, 64)["factors"])


def test_the_number_of_local_crops_leaves_the_global_ones_alone():
    few, many_crops = (sample_parameters(AugmentationConfig(local_crops_number=n), 1, 2, 3, 64, 64) for n in (0, 6))
    assert all(np.array_equal(few[name], many_crops[name][:2]) for name in few)


def test_large_keys_of_hashes_are_accepted():
    cfg = AugmentationConfig()
    one, two = (sample_parameters(cfg, 0, 0, key, 64, 64)["boxes"] for key in (2**62 + 1, 2**62 + 2))
    assert not np.array_equal(one, two)


def test_probabilities_are_those_of_the_config():
    table = many(AugmentationConfig())
    globals_, local = slice(0, 2), slice(2, None)
    for name, expected in (("flip", 0.5), ("jitter", 0.8), ("grayscale", 0.2)):
        # 600 x 10 draws: four standard errors are at most 0.026
        assert table[name].mean() == pytest.approx(expected, abs=0.026)
    blurred = table["blur_sigma"] > 0
    assert blurred[:, 0].all()
    assert blurred[:, 1].mean() == pytest.approx(0.1, abs=0.05)
    assert blurred[:, local].mean() == pytest.approx(0.5, abs=0.03)
    assert table["solarize"][:, 1].mean() == pytest.approx(0.2, abs=0.066)
    assert not table["solarize"][:, 0].any() and not table["solarize"][:, local].any()
    assert table["blur_sigma"][blurred].min() >= 0.1 and table["blur_sigma"].max() <= 2.0
    assert not table["flip"][:, globals_].all(axis=1).all()


def test_everything_off_is_off():
    off = AugmentationConfig(
        hflip_prob=0.0,
        color_jitter_prob=0.0,
        grayscale_prob=0.0,
        blur_prob=(0.0, 0.0, 0.0),
        solarize_prob=(0.0, 0.0, 0.0),
    )
    table = many(off)
    assert not any(table[name].any() for name in ("flip", "jitter", "grayscale", "blur_sigma", "solarize"))


def test_jitter_factors_fill_their_ranges_and_every_order_occurs():
    table = many(AugmentationConfig(color_jitter=(0.4, 0.3, 2.0, 0.1)))
    factors = table["factors"].reshape(-1, 4)
    low, high = np.array([0.6, 0.7, 0.0, -0.1]), np.array([1.4, 1.3, 3.0, 0.1])
    assert (factors >= low - 1e-6).all() and (factors <= high + 1e-6).all()
    assert np.abs(factors.min(0) - low).max() < 0.01 and np.abs(factors.max(0) - high).max() < 0.01
    orders = table["order"].reshape(-1, 4)
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24 and counts.min() > 0.6 * len(orders) / 24


def test_choices_are_independent_of_each_other():
    # local crops only: a kind of view has its own scales and probabilities, which do correlate
    table = {name: values[:, 2:] for name, values in many(AugmentationConfig()).items()}
    columns = [table[name].reshape(-1).astype(float) for name in ("flip", "jitter", "grayscale", "blur_sigma")]
    columns += [*table["factors"].reshape(-1, 4).T, table["boxes"][..., 0].reshape(-1).astype(float)]
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 0.06  # four standard errors of 4800 draws


def test_crop_areas_follow_their_scales():
    boxes = many(AugmentationConfig())["boxes"]
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]) / (320 * 240)
    assert area[:, :2].min() > 0.39 and area[:, 2:].max() < 0.41 and area[:, 2:].min() > 0.045
    assert area[:, 2:].mean() == pytest.approx(0.225, abs=0.01)


def test_an_epoch_visits_every_example_once_in_its_own_order():
    orders = [epoch_order(3, epoch, 50) for epoch in range(2)]
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert orders[0].tolist() != orders[1].tolist()
    assert orders[0].tolist() == epoch_order(3, 0, 50).tolist() != epoch_order(4, 0, 50).tolist()
