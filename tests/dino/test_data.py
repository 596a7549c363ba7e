# SPDX-License-Identifier: Apache-2.0
"""From a data set on disk to batches: columns, crops, order, unreadable images, streams."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_simprune.data.decoding import decode_image, image_size, to_rgb
from hf_simprune.data.loading import find_image_column, find_label_column, load_split
from hf_simprune.data.streams import ShuffledStream
from hf_simprune.dino import data
from hf_simprune.dino.augmentation import AugmentationConfig, epoch_order, sample_parameters
from hf_simprune.dino.batch import PARAMETER_NAMES, collate
from hf_simprune.dino.crops import cut_crops, draft_factor, make_views
from hf_simprune.dino.data import BadImageError, MultiCropDataset, decode_small_set
from hf_simprune.dino.sampler import GlobalBatchSampler
from hf_simprune.dino.streaming import StreamingMultiCropDataset
from hf_simprune.errors import InputError

from .image_files import CFG, encode, one_line_naming, pixels, write_parquet


# Opening


def test_a_parquet_file_of_encoded_bytes(parquet):
    dataset = load_split(parquet, "train")
    assert (
        len(dataset) == 12 and find_image_column(dataset) == "image" and find_label_column(dataset.features) == "label"
    )
    assert len(load_split(parquet, "train[:50%]")) == 6 and len(load_split(parquet, "train", max_samples=5)) == 5


def test_a_folder_of_parquet_files_with_an_image_feature(tmp_path, images):
    folder = tmp_path / "set"
    folder.mkdir()
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    rows = [{"picture": {"bytes": image, "path": None}, "kind": i % 2} for i, image in enumerate(images)]
    for split, part in (("train", rows[:8]), ("test", rows[8:])):
        datasets.Dataset.from_list(part, features=features).to_parquet(folder / f"{split}-00000.parquet")
    dataset = load_split(str(folder), "test")
    assert len(dataset) == 4 and find_image_column(dataset) == "picture"
    assert find_label_column(dataset.features) == "kind"
    made = MultiCropDataset(dataset, "picture", CFG, seed=0)[0, 0]
    assert torch.equal(made["global_crops"], make_views(images[8], CFG, 0, 0, 0)["global_crops"])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_images(tmp_path, images, streaming):
    for number, image in enumerate(images):
        path = tmp_path / "set" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    dataset = load_split(str(tmp_path / "set"), "train", streaming=streaming)
    assert find_image_column(dataset) == "image" and find_label_column(dataset.features) == "label"
    if streaming:
        rows = ShuffledStream(dataset, ["image"], seed=0)
        made = next(iter(StreamingMultiCropDataset(rows, "image", CFG, seed=0)))
    else:
        made = MultiCropDataset(dataset, "image", CFG, seed=0)[0, 3]
    assert made["global_crops"].shape == (2, 3, 24, 24)


def test_a_struct_of_bytes_and_path(tmp_path, images):
    structs = [{"bytes": image, "path": None} for image in images]
    path = write_parquet(tmp_path / "x.parquet", structs)
    dataset = load_split(path, "train")
    assert find_image_column(dataset) == "image"
    assert MultiCropDataset(dataset, "image", CFG, seed=0)[0, 0]["local_crops"].shape == (2, 3, 12, 12)


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_names_are_refused_in_one_line(tmp_path, parquet, streaming):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    empty = write_parquet(tmp_path / "nothing.parquet", [])
    for name in ("./not_here", str(tmp_path / "gone.parquet"), str(tmp_path / "empty"), "no-such-name/no-such-set"):
        with pytest.raises(InputError) as error:
            load_split(name, "train", streaming=streaming)
        one_line_naming(error, "--dataset_name_or_path", name)
    with pytest.raises(InputError) as error:
        load_split(str(tmp_path / "broken.parquet"), "train", streaming=streaming)
    one_line_naming(error, "--dataset_name_or_path", "broken.parquet")
    with pytest.raises(InputError) as error:
        load_split(empty, "train", streaming=streaming)
    one_line_naming(error, "--dataset_name_or_path", "no rows")
    with pytest.raises(InputError) as error:
        load_split(parquet, "validation", streaming=streaming, split_option="--eval_split")
    one_line_naming(error, "--eval_split", "validation", "train")
    with pytest.raises(InputError) as error:
        load_split(parquet, "train", streaming=streaming, trust_remote_code=True)
    one_line_naming(error, "--trust_remote_code")


def test_columns_that_cannot_be_told_are_refused_by_name(tmp_path, images):
    masks = [encode(pixels(90 + i)) for i in range(12)]
    both = load_split(write_parquet(tmp_path / "a.parquet", images, mask=masks, junk=[b"no image"] * 12), "train")
    with pytest.raises(InputError) as error:
        find_image_column(both)
    one_line_naming(error, "--image_column", "image", "mask")
    assert "junk" not in str(error.value)
    assert find_image_column(both, "mask") == "mask"
    with pytest.raises(InputError) as error:
        find_image_column(both, "photo")
    one_line_naming(error, "--image_column photo", "image, label, mask, junk")
    for column in ("label", "junk"):
        with pytest.raises(InputError, match=f"--image_column {column}"):
            find_image_column(both, column)
    none = load_split(write_parquet(tmp_path / "b.parquet", [b"x"] * 3, name=["a", "b", "c"]), "train")
    with pytest.raises(InputError) as error:
        find_image_column(none)
    one_line_naming(error, "image, label, name")


def test_label_columns():
    number, text = datasets.Value("int64"), datasets.Value("string")
    assert find_label_column(datasets.Features({"image": text, "count": number})) is None
    assert find_label_column(datasets.Features({"label": number, "coarse_label": number})) == "label"
    features = datasets.Features({"fine_label": number, "coarse_label": number, "name": text})
    with pytest.raises(InputError, match="--label_column: fine_label, coarse_label"):
        find_label_column(features)
    assert find_label_column(features, "coarse_label") == "coarse_label"
    with pytest.raises(InputError, match="--label_column name: .*fine_label, coarse_label"):
        find_label_column(features, "name")


# Crops


def test_crops_are_pillows_crop_and_resize():
    image = pixels(3, 301, 222)
    rng = np.random.default_rng(0)
    corners = rng.integers(0, [250, 180], (12, 2))
    boxes = np.concatenate([corners, np.minimum(corners + rng.integers(8, 200, (12, 2)), [301, 222])], axis=1)
    for size in (12, 96):
        ours = cut_crops(torch.from_numpy(image.copy()), boxes, size).permute(0, 2, 3, 1).numpy().astype(int)
        for crop, box in zip(ours, boxes.tolist()):
            theirs = Image.fromarray(image).crop(box).resize((size, size), Image.Resampling.BICUBIC)
            difference = np.abs(crop - np.asarray(theirs).astype(int))
            assert difference.max() <= 3 and difference.mean() < 0.5


def test_draft_mode_never_makes_a_crop_larger_than_its_pixels():
    sizes = np.array([24, 24, 12])
    assert draft_factor(np.array([[0, 0, 192, 200], [5, 5, 300, 250], [0, 0, 97, 96]]), sizes) == 8
    assert draft_factor(np.array([[0, 0, 192, 191], [5, 5, 300, 250], [0, 0, 97, 96]]), sizes) == 4
    assert draft_factor(np.array([[0, 0, 192, 200], [5, 5, 300, 250], [0, 0, 97, 30]]), sizes) == 2
    assert draft_factor(np.array([[0, 0, 192, 200], [5, 5, 300, 250], [0, 0, 97, 23]]), sizes) == 1


def test_a_large_jpeg_is_decoded_smaller_and_gives_the_same_crops(monkeypatch):
    large = encode(pixels(4, 801, 603), "JPEG", quality=95)
    used = []
    monkeypatch.setattr("hf_simprune.dino.crops.draft_factor", lambda *a: used.append(draft_factor(*a)) or used[-1])
    for key in range(6):
        drafted = make_views(large, CFG, 0, 0, key)
        full = make_views(decode_image(large), CFG, 0, 0, key)
        assert all(np.array_equal(drafted[name], full[name]) for name in PARAMETER_NAMES)
        for crops in ("global_crops", "local_crops"):
            theirs = full[crops].float()
            # a box is rounded to reduced pixels, which are no larger than the crop's own: at most half of one is lost
            half_pixel = 0.5 * (theirs.diff(dim=-1).abs().mean() + theirs.diff(dim=-2).abs().mean())
            assert (drafted[crops].float() - theirs).abs().mean() < half_pixel
    assert max(used) >= 4


def test_every_kind_of_image_becomes_rgb():
    rgb = Image.fromarray(pixels(0))
    grey = rgb.convert("L")
    ramp = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
    expected_grey = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    assert np.array_equal(decode_image(encode(grey)), expected_grey)
    alpha = rgb.copy()
    alpha.putalpha(grey)
    assert np.array_equal(decode_image(encode(alpha)), np.asarray(rgb))
    palette = rgb.quantize(64)
    assert np.array_equal(decode_image(encode(palette)), np.asarray(palette.convert("RGB")))
    transparent = encode(palette, transparency=0)
    assert np.array_equal(decode_image(transparent), np.asarray(palette.convert("RGB")))
    assert np.array_equal(decode_image(encode(Image.fromarray(ramp)))[..., 0], ramp // 256)
    unit = Image.fromarray((ramp / 65535).astype(np.float32))
    assert np.abs(np.asarray(to_rgb(unit))[..., 1].astype(int) - ramp / 257).max() <= 1
    cmyk = np.asarray(decode_image(encode(rgb.convert("CMYK"), "JPEG", quality=100))).astype(int)
    assert np.abs(cmyk - np.asarray(rgb)).mean() < 4
    assert decode_image(encode(rgb.convert("1"))).shape == (30, 40, 3)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = encode(pixels(0), "JPEG", quality=100, exif=exif)
    plain = encode(pixels(0), "JPEG", quality=100)
    assert image_size(turned) == (30, 40) and image_size(plain) == (40, 30)
    assert torch.equal(decode_image(turned), decode_image(plain).rot90(-1))


# Map-style examples


def test_examples_carry_what_was_drawn_for_them(parquet, images):
    dataset = MultiCropDataset(load_split(parquet, "train"), "image", CFG, seed=9)
    batch = collate([dataset[2, index] for index in (5, 1, 7)])
    assert batch.global_crops.shape == (2, 3, 3, 24, 24) and batch.global_crops.dtype == torch.uint8
    assert batch.local_crops.shape == (2, 3, 3, 12, 12) and len(batch) == 3
    assert batch.indices.tolist() == [5, 1, 7] and batch.bad_indices == ()
    for position, index in enumerate((5, 1, 7)):
        image = decode_image(images[index])
        drawn = sample_parameters(CFG, 9, 2, index, image.shape[1], image.shape[0])
        for name in PARAMETER_NAMES:
            assert np.array_equal(getattr(batch.parameters, name)[:, position], drawn[name])
        assert torch.equal(batch.global_crops[:, position], cut_crops(image, drawn["boxes"][:2], 24))
        assert torch.equal(batch.local_crops[:, position], cut_crops(image, drawn["boxes"][2:], 12))


def test_without_local_crops_there_are_none(parquet):
    cfg = AugmentationConfig(global_crop_size=24, local_crops_number=0)
    dataset = MultiCropDataset(load_split(parquet, "train"), "image", cfg, seed=9)
    batch = collate([dataset[0, 0]]).to("cpu")
    assert batch.local_crops is None and batch.parameters.flip.shape == (2, 1)


def test_the_cache_changes_nothing_but_time(parquet, images, monkeypatch):
    rows = load_split(parquet, "train")
    cache = decode_small_set(rows, "image")
    assert cache.nbytes == sum(3 * 30 * (40 + i) for i in range(12))
    decoded, cached = (MultiCropDataset(rows, "image", CFG, seed=1, cache=c) for c in (None, cache))
    monkeypatch.setattr(data, "encoded_bytes", None) or cached[0, 0]
    monkeypatch.undo()
    for index in range(12):
        assert torch.equal(decoded[3, index]["global_crops"], cached[3, index]["global_crops"])
    # 12 x the first image's 3600 bytes is the estimate; the images are a little larger
    assert decode_small_set(rows, "image", limit=12 * 3600 - 1) is None
    assert decode_small_set(rows, "image", limit=12 * 3600 + 1) is None


@pytest.mark.parametrize("cached", [False, True])
def test_the_next_readable_image_takes_the_place_of_an_unreadable_one(broken, images, cached):
    rows = load_split(broken, "train")
    cache = decode_small_set(rows, "image") if cached else None
    dataset = MultiCropDataset(rows, "image", CFG, seed=0, cache=cache)
    batch = collate([dataset[0, index] for index in (2, 3, 11)])
    assert batch.bad_indices == (3, 4, 11) and batch.indices.tolist() == [2, 3, 11]
    replacement = make_views(images[5], CFG, 0, 0, 3)
    assert torch.equal(batch.global_crops[:, 1], replacement["global_crops"])
    assert torch.equal(batch.global_crops[:, 2], make_views(images[0], CFG, 0, 0, 11)["global_crops"])


@pytest.mark.parametrize("workers", [0, 1])
def test_on_bad_image_error_stops_with_the_index_in_one_line(broken, workers):
    dataset = MultiCropDataset(load_split(broken, "train"), "image", CFG, seed=0, on_bad_image="error")
    loader = DataLoader(dataset, batch_sampler=[[(0, 2), (0, 4)]], collate_fn=collate, num_workers=workers)
    with pytest.raises(BadImageError) as error:
        next(iter(loader))
    one_line_naming(error, "image 4", "--on_bad_image")
    assert str(error.value).startswith("image 4")


def test_a_set_without_any_readable_image_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_BAD_IN_A_ROW", 5)
    rows = load_split(write_parquet(tmp_path / "x.parquet", [b"junk"] * 9), "train")
    with pytest.raises(BadImageError, match="images in a row cannot be read, beginning with image 7"):
        MultiCropDataset(rows, "image", CFG, seed=0)[0, 7]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(parquet, workers):
    dataset = MultiCropDataset(load_split(parquet, "train"), "image", CFG, seed=0)

    def batches(num_workers):
        sampler = GlobalBatchSampler(12, 4, total_steps=4, seed=2)
        return list(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers))

    for plain, worked in zip(batches(0), batches(workers), strict=True):
        assert torch.equal(plain.global_crops, worked.global_crops) and torch.equal(plain.indices, worked.indices)
        assert np.array_equal(plain.parameters.factors, worked.parameters.factors)


# Order


def test_micro_batches_and_ranks_share_out_each_steps_images():
    def steps(batch, world, accumulation, total=7):
        ranks = [list(GlobalBatchSampler(50, batch, total, world, r, accumulation, seed=3)) for r in range(world)]
        assert all(len(micro) == total * accumulation for micro in ranks)
        return [
            [ranks[r][t * accumulation + a] for a in range(accumulation) for r in range(world)] for t in range(total)
        ]

    whole = [sum(parts, []) for parts in steps(16, 1, 1)]
    assert [sum(parts, []) for parts in steps(4, 2, 2)] == [sum(parts, []) for parts in steps(2, 1, 8)] == whole
    for t, indexes in enumerate(whole):
        epoch, within = divmod(t, 3)  # floor(50 / 16) steps an epoch
        assert indexes == [(epoch, i) for i in epoch_order(3, epoch, 50)[16 * within : 16 * (within + 1)]]


def test_a_resumed_sampler_goes_on_where_it_stopped():
    full = list(GlobalBatchSampler(50, 4, 20, 2, 1, 2, seed=3))
    resumed = GlobalBatchSampler(50, 4, 20, 2, 1, 2, seed=3, start_step=11)
    assert list(resumed) == full[22:] and len(resumed) == 18


def test_an_endless_sampler_begins_like_a_limited_one():
    endless = iter(GlobalBatchSampler(10, 3))
    assert [next(endless) for _ in range(9)] == list(GlobalBatchSampler(10, 3, 9))


def test_a_batch_larger_than_the_set_is_refused():
    GlobalBatchSampler(24, 4, 1, world_size=2, accumulation=3)
    with pytest.raises(InputError) as error:
        GlobalBatchSampler(23, 4, 1, world_size=2, accumulation=3)
    one_line_naming(error, "--per_device_train_batch_size 4", "24", "23")


def test_real_photographs_go_through(shared_data):
    dataset = load_split(str(shared_data / "imagenet_sample500_240.parquet"), "train", max_samples=4)
    examples = MultiCropDataset(dataset, find_image_column(dataset), AugmentationConfig(), seed=0)
    batch = collate([examples[0, index] for index in range(4)])
    assert batch.global_crops.shape == (2, 4, 3, 224, 224) and batch.local_crops.shape == (8, 4, 3, 96, 96)
    assert batch.global_crops.float().std() > 30
