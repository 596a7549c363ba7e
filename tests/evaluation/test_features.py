# SPDX-License-Identifier: Apache-2.0
"""Features of real and random networks against one image at a time, and the saved processor's round trip."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    DeiTConfig,
    DeiTModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from hf_simprune.errors import InputError
from hf_simprune.evaluation.features import build_image_processor, extract_features, raw_pixel_features


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    sizes = [(16, 16), (20, 31), (40, 17), (16, 16), (9, 9)]
    arrays = [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]
    return [Image.fromarray(array) for array in arrays]


@pytest.fixture(scope="module")
def processor():
    return build_image_processor(16, MEAN, STD)


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return model


def by_hand(image, size=16):
    """Resize with PIL, rescale and normalise with numpy."""
    array = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)).astype(np.float64) / 255
    return torch.tensor(((array - MEAN) / STD).transpose(2, 0, 1), dtype=torch.float32)


@pytest.mark.parametrize(
    ("model_class", "config", "prefix"),
    [
        (ViTModel, ViTConfig(**SMALL, intermediate_size=48), 1),
        (DeiTModel, DeiTConfig(**SMALL, intermediate_size=48), 2),
        (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4), 5),
    ],
)
def test_class_and_patch_features_of_each_image(model_class, config, prefix, images, processor):
    model = randomised(model_class(config)).eval()
    features = extract_features(model, images, processor, batch_size=2, progress=False)
    assert features["cls"].shape == features["patch_mean"].shape == (5, 24)
    for i, image in enumerate(images):
        with torch.no_grad():
            tokens = model(by_hand(image)[None]).last_hidden_state[0]
        assert tokens.shape[0] == prefix + 16
        torch.testing.assert_close(features["cls"][i], tokens[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(features["patch_mean"][i], tokens[prefix:].mean(0), rtol=1e-4, atol=1e-4)


def test_a_generator_is_read_once_and_gives_the_same_features(images, processor):
    model = randomised(ViTModel(ViTConfig(**SMALL, intermediate_size=48)))
    listed = extract_features(model, images, processor, batch_size=3, progress=False)
    streamed = extract_features(model, (image for image in images), processor, batch_size=3, progress=False)
    assert torch.equal(listed["cls"], streamed["cls"])
    assert torch.equal(listed["patch_mean"], streamed["patch_mean"])


def test_every_module_returns_to_its_own_mode_even_after_an_error(images, processor):
    model = ViTModel(ViTConfig(**SMALL, intermediate_size=48, hidden_dropout_prob=0.5))
    model.train()
    model.layers[0].eval()
    before = [module.training for module in model.modules()]
    first = extract_features(model, images, processor, progress=False)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(first["cls"], extract_features(model, images, processor, progress=False)["cls"])
    with pytest.raises(InputError):
        extract_features(model, [], processor, progress=False)
    assert [module.training for module in model.modules()] == before


def test_features_are_fp32_and_carry_no_gradient(images, processor):
    model = ViTModel(ViTConfig(**SMALL, intermediate_size=48)).to(torch.bfloat16)
    features = extract_features(model, images, processor, progress=False)
    for feature in features.values():
        assert feature.dtype == torch.float32 and feature.device.type == "cpu" and not feature.requires_grad


def test_a_network_without_tokens_is_refused(images, processor):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    config.patch_size = 4
    with pytest.raises(InputError, match="class token"):
        extract_features(ResNetModel(config), images, processor, progress=False)


def test_images_of_any_mode_are_read_as_rgb(processor):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    coloured = Image.merge("RGB", [grey] * 3)
    pixels = raw_pixel_features([grey, coloured, grey.convert("P"), coloured.convert("RGBA")], processor)
    for row in pixels:
        assert torch.equal(row, pixels[0])


def test_raw_pixels_are_what_the_network_sees(images, processor):
    pixels = raw_pixel_features(images, processor, batch_size=2)
    expected = torch.stack([by_hand(image).flatten() for image in images])
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loading", [{}, {"backend": "pil"}])
def test_the_saved_processor_reloads_with_auto_and_gives_the_same_pixels(loading, images, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, **loading)
    for image in images:
        ours = processor(images=image, return_tensors="pt")["pixel_values"]
        theirs = loaded(images=image, return_tensors="pt")["pixel_values"]
        # The torchvision backend, where there is one, rounds differently while it resizes.
        tolerance = 0 if type(loaded) is type(processor) else 2 / 255 / min(STD)
        assert (ours - theirs).abs().max() <= tolerance


def test_the_saved_processor_names_a_class_that_exists_in_both_backends(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "ViTImageProcessor"
    assert saved["size"] == {"height": 16, "width": 16}
    assert (saved["image_mean"], saved["image_std"]) == (MEAN, STD)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((0, MEAN, STD), "image_size=0"), ((16, [0.5], STD), "3 values"), ((16, MEAN, [0.2, 0.0, 0.2]), "above 0")],
)
def test_bad_processor_settings_are_named(arguments, words):
    with pytest.raises(InputError, match=words):
        build_image_processor(*arguments)


def test_real_features_of_real_images_find_the_class(shared_data):
    """A trained DeiT tells flowers apart far better than their pixels do: wrong tokens or pixels would show here."""
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    from hf_simprune.evaluation.knn import knn_accuracy

    path = shared_data / "tf_flowers_200_60.parquet"
    rows = load_dataset("parquet", data_files=str(path), split="train")
    rows = rows.cast_column("image", ImageFeature())
    model = ViTModel.from_pretrained(shared_data / "deit_tiny_patch16_224", add_pooling_layer=False)
    processor = AutoImageProcessor.from_pretrained(shared_data / "deit_tiny_patch16_224", backend="pil")
    features = extract_features(model, rows["image"], processor, batch_size=20, progress=False)
    labels = torch.tensor(rows["label"])
    raw = raw_pixel_features(rows["image"], processor)
    to_beat = knn_accuracy(raw[:200], labels[:200], raw[200:], labels[200:])
    assert to_beat > 0.3  # chance is 0.2
    for feature in features.values():
        assert knn_accuracy(feature[:200], labels[:200], feature[200:], labels[200:]) > to_beat + 0.15
