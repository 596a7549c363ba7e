# SPDX-License-Identifier: Apache-2.0
"""The tensor functions beside Pillow, whose ImageEnhance defines the operations of DINO's recipe."""

import colorsys
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from hf_simprune.dino import photometric
from hf_simprune.dino.augmentation import AugmentationConfig, sample_parameters
from hf_simprune.dino.batch import PARAMETER_NAMES, collate
from hf_simprune.dino.photometric import apply_photometric


SIZE = (37, 53)  # odd on purpose: no multiple of a vector register


def scene(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """An image with smooth colours, edges, noise and saturated corners, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : size[0], 0 : size[1]] / max(size)
    phases = rng.random((3, 3)) * 6
    waves = [128 + 120 * np.sin(a * 9 * x + b + (3 * c - 9) * y) for a, b, c in phases]
    pixels = np.stack(waves, axis=-1) + rng.normal(0, 8, (*size, 3))
    pixels[:6, :6] = (255, 0, 0)
    pixels[-6:, -6:] = (255, 255, 255)
    pixels[:6, -6:] = 0
    return pixels.clip(0, 255).astype(np.uint8)


SCENES = [scene(seed) for seed in range(4)]


def as_tensor(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()


def assert_close(result: torch.Tensor, expected: list[Image.Image], mean: float, largest: float) -> None:
    """Levels of 255; Pillow truncates to whole levels after every step, which we do not."""
    difference = (result - as_tensor([np.asarray(image) for image in expected])).abs()
    assert difference.mean() <= mean and difference.max() <= largest


@pytest.mark.parametrize(
    ("operation", "enhancer"),
    [
        (photometric.adjust_brightness_, ImageEnhance.Brightness),
        (photometric.adjust_contrast_, ImageEnhance.Contrast),
        (photometric.adjust_saturation_, ImageEnhance.Color),
    ],
)
def test_enhancements_are_pillows_before_its_truncation(operation, enhancer):
    factors = [0.6, 1.0, 1.37, 0.0]
    expected = [enhancer(Image.fromarray(image)).enhance(factor) for image, factor in zip(SCENES, factors)]
    # truncation loses up to a level; the rounded grey value adds half of |1 - factor|
    assert_close(operation(as_tensor(SCENES), torch.tensor(factors)), expected, mean=0.6, largest=1.6)


def test_grayscale_is_pillows():
    expected = [Image.fromarray(image).convert("L").convert("RGB") for image in SCENES]
    assert_close(photometric.to_grayscale_(as_tensor(SCENES)), expected, mean=0.3, largest=0.51)


def test_solarize_is_pillows_on_whole_levels():
    expected = [ImageOps.solarize(Image.fromarray(image), 128) for image in SCENES]
    assert_close(photometric.solarize_(as_tensor(SCENES)), expected, mean=0, largest=0)


@pytest.mark.parametrize("limit", [0.1, 0.5])
def test_hue_shift_is_a_rotation_in_hsv(limit):
    turns = np.array([-limit, -0.037, 0.08, limit], dtype=np.float32)
    result = photometric.shift_hue(as_tensor(SCENES), torch.from_numpy(turns), max_turns=limit).permute(0, 2, 3, 1)
    for image, shift, shifted in zip(SCENES, turns, result.numpy()):
        expected = np.empty(shifted.shape)
        for place in np.ndindex(*SIZE):
            hue, saturation, value = colorsys.rgb_to_hsv(*(image[place] / 255.0))
            expected[place] = colorsys.hsv_to_rgb((hue + float(shift)) % 1.0, saturation, value)
        assert np.abs(shifted - 255 * expected).max() < 1e-3


def test_hue_shift_is_pillows_up_to_its_256_hues():
    # torchvision adds uint8(255 * turns) to the hue channel
    shifts = [-20, -5, 13, 25]
    expected = []
    for image, shift in zip(SCENES, shifts):
        hue, saturation, value = Image.fromarray(image).convert("HSV").split()
        hue = Image.fromarray((np.asarray(hue).astype(int) + shift).astype(np.uint8))
        expected.append(Image.merge("HSV", (hue, saturation, value)).convert("RGB"))
    result = photometric.shift_hue(as_tensor(SCENES), torch.tensor(shifts) / 255, max_turns=0.1)
    # a hue step is up to 6 levels of a channel, saturation is whole levels too
    assert_close(result, expected, mean=1.0, largest=12.0)


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.3, 2.0])
def test_blur_is_a_gaussian_with_repeated_edges(sigma):
    x = as_tensor(SCENES)
    result = photometric.gaussian_blur(x, torch.from_numpy(photometric.blur_kernels(np.full(4, sigma))))
    reach = 10
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    for image, blurred in zip(SCENES, result.permute(0, 2, 3, 1).numpy()):
        padded = np.pad(image.astype(float), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
        rows = sum(w * padded[k : k + SIZE[0]] for k, w in enumerate(weights))
        exact = sum(w * rows[:, k : k + SIZE[1]] for k, w in enumerate(weights))
        # the kernel is cut where 0.7 % of its mass is left
        assert np.abs(blurred - exact).max() < 1.5 and np.abs(blurred - exact).mean() < 0.25


def test_blur_is_pillows_within_its_box_approximation():
    sigmas = np.array([0.5, 1.0, 1.5, 2.0])
    expected = [Image.fromarray(i).filter(ImageFilter.GaussianBlur(float(s))) for i, s in zip(SCENES, sigmas)]
    result = photometric.gaussian_blur(as_tensor(SCENES), torch.from_numpy(photometric.blur_kernels(sigmas)))
    assert_close(result, expected, mean=1.0, largest=20.0)  # the largest at black-white edges


def test_blur_of_a_crop_smaller_than_the_kernel_keeps_its_mean():
    x = torch.full((1, 3, 2, 2), 100.0)
    blurred = photometric.gaussian_blur(x, torch.from_numpy(photometric.blur_kernels(np.array([2.0]))))
    assert torch.allclose(blurred, x, atol=1e-3)


def examples(cfg: AugmentationConfig, count: int) -> list[dict]:
    made = []
    for key in range(count):
        parameters = sample_parameters(cfg, 5, 1, key, 64, 64)
        parameters.pop("boxes")
        sizes = [cfg.global_crop_size] * 2 + [cfg.local_crop_size] * cfg.local_crops_number
        views = [torch.from_numpy(scene(100 * key + v, (s, s))).permute(2, 0, 1) for v, s in enumerate(sizes)]
        local = torch.stack(views[2:]) if views[2:] else None
        made.append(
            {
                **parameters,
                "global_crops": torch.stack(views[:2]),
                "local_crops": local,
                "index": key,
                "bad_indices": [],
            }
        )
    return made


STRONG = AugmentationConfig(
    global_crop_size=31,
    local_crop_size=17,
    local_crops_number=3,
    blur_prob=(0.7, 0.4, 0.5),
    solarize_prob=(0.3, 0.3, 0.3),
)


def naive_pipeline(crop: torch.Tensor, row: dict, cfg: AugmentationConfig) -> np.ndarray:
    """One view in plain float arithmetic, in the order of DINO's recipe; (H, W, 3) normalised."""
    x = crop.permute(1, 2, 0).numpy().astype(float)
    grey = lambda x: (x @ np.array([0.299, 0.587, 0.114]))[..., None]  # noqa: E731
    if row["flip"]:
        x = x[:, ::-1]
    for number in row["order"] if row["jitter"] else ():
        factor = float(row["factors"][number])
        if number == 0:
            x = x * factor
        elif number == 1:
            x = factor * x + (1 - factor) * np.floor(np.rint(grey(x)).mean() + 0.5)
        elif number == 2:
            x = factor * x + (1 - factor) * grey(x)
        else:
            hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in x.reshape(-1, 3) / 255]
            x = 255 * np.array([colorsys.hsv_to_rgb((h + factor) % 1, s, v) for h, s, v in hsv]).reshape(x.shape)
        x = x.clip(0, 255)
    if row["grayscale"]:
        x = np.repeat(grey(x), 3, axis=-1)
    if row["blur_sigma"] > 0.2:
        sigma = float(row["blur_sigma"])
        reach = int(np.ceil(2.7 * sigma))
        weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        weights /= weights.sum()
        for axis in (0, 1):
            padding = [(0, 0)] * 3
            padding[axis] = (reach, reach)
            padded, size = np.pad(x, padding, mode="edge"), x.shape[axis]
            x = sum(w * np.take(padded, range(k, k + size), axis=axis) for k, w in enumerate(weights))
    if row["solarize"]:
        x = np.minimum(x, 255 - x)
    return (x / 255 - np.array(cfg.image_mean)) / np.array(cfg.image_std)


def test_a_batch_goes_through_the_recipe_view_by_view():
    count = 8
    made = examples(STRONG, count)
    global_crops, local_crops = apply_photometric(collate(made), STRONG, "cpu")
    assert global_crops.shape == (2 * count, 3, 31, 31) and local_crops.shape == (3 * count, 3, 17, 17)
    for e, example in enumerate(made):
        for v in range(5):
            row = {name: example[name][v] for name in PARAMETER_NAMES}
            crop = example["global_crops"][v] if v < 2 else example["local_crops"][v - 2]
            ours = global_crops[v * count + e] if v < 2 else local_crops[(v - 2) * count + e]
            difference = np.abs(ours.permute(1, 2, 0).numpy() - naive_pipeline(crop, row, STRONG))
            # a grey value at .5 may round the other way and move the contrast's mean by one level
            assert difference.max() < 0.02, (e, v, row)


@pytest.mark.parametrize("cut", [1, 5])
def test_an_example_does_not_depend_on_its_neighbours(cut, monkeypatch):
    made = examples(STRONG, 12)
    whole = apply_photometric(collate(made), STRONG, "cpu")
    # other chunks as well as other batches
    monkeypatch.setattr(photometric, "_CPU_CHUNK_PIXELS", 2 * 31 * 31)
    parts = [apply_photometric(collate(part), STRONG, "cpu") for part in (made[:cut], made[cut:])]
    for kind, views in ((0, 2), (1, 3)):
        joined = torch.cat([part[kind].unflatten(0, (views, -1)) for part in parts], dim=1)
        assert torch.equal(whole[kind].unflatten(0, (views, -1)), joined)


def test_nothing_drawn_means_only_normalisation():
    cfg = dataclasses.replace(
        STRONG,
        local_crops_number=0,
        hflip_prob=0.0,
        color_jitter_prob=0.0,
        grayscale_prob=0.0,
        blur_prob=(0.0, 0.0, 0.0),
        solarize_prob=(0.0, 0.0, 0.0),
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )
    batch = collate(examples(cfg, 3))
    global_crops, local_crops = apply_photometric(batch, cfg, "cpu")
    assert local_crops is None
    assert torch.allclose(global_crops, batch.global_crops.flatten(0, 1).float() / 127.5 - 1, atol=1e-6)


def test_the_input_batch_is_left_alone():
    batch = collate(examples(STRONG, 2))
    before = batch.global_crops.clone()
    apply_photometric(batch, STRONG, "cpu")
    assert torch.equal(batch.global_crops, before)
