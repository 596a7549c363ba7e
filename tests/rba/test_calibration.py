"""Choosing and reading the images of an analysis."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_simprune.errors import InputError
from hf_simprune.evaluation.features import build_image_processor
from hf_simprune.rba.calibration import (
    ImageReader,
    calibration_set,
    open_calibration_set,
    split_images,
)


PROCESSOR = build_image_processor(8, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def png(seed: int, size: tuple[int, int] = (9, 12)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def cells_with_broken(rows: int, broken: set[int]) -> list[bytes]:
    return [b"no image" if row in broken else png(row) for row in range(rows)]


def test_parts_are_disjoint_seeded_and_two_thirds_fit():
    split = split_images(100, 40, seed=3)
    assert (len(split.fit), len(split.select), len(split.evaluation)) == (27, 13, 33)
    together = split.fit + split.select + split.evaluation
    assert len(set(together)) == len(together) and set(together) <= set(range(100))
    assert split == split_images(100, 40, seed=3)
    assert split != split_images(100, 40, seed=4)
    assert list(split.fit) != sorted(split.fit)


def test_held_out_rows_do_not_depend_on_the_number_of_calibration_images():
    assert split_images(100, 10).evaluation == split_images(100, 500).evaluation


def test_without_holding_out_all_rows_may_calibrate():
    split = split_images(50, 500, hold_out=False)
    assert sorted(split.fit + split.select) == list(range(50)) and split.evaluation == ()


@pytest.mark.parametrize(
    ("rows", "wanted", "named"), [(100, 2, "--calibration_images 2"), (3, 500, "3 rows leave 2 images")]
)
def test_too_few_images_are_refused(rows, wanted, named):
    with pytest.raises(InputError, match=named):
        split_images(rows, wanted)


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_every_image_is_read_once_and_chunks_do_not_depend_on_the_world(world):
    reader = ImageReader([png(row) for row in range(23)], PROCESSOR)
    wanted = list(range(22, -1, -1))
    alone = {chunk.number: chunk for chunk in reader.chunks(wanted, 4)}
    shared = [chunk for rank in range(world) for chunk in reader.chunks(wanted, 4, rank, world)]
    assert sorted(chunk.number for chunk in shared) == list(range(6))
    assert sorted(index for chunk in shared for index in chunk.indices) == list(range(23))
    for chunk in shared:
        assert chunk.indices == alone[chunk.number].indices
        assert torch.equal(chunk.pixel_values, alone[chunk.number].pixel_values)


def test_pixels_are_those_of_the_processor():
    images = [Image.open(io.BytesIO(png(row, (7 + row, 9)))) for row in range(3)]
    chunk = next(ImageReader(images, PROCESSOR).chunks([2, 0, 1], 3))
    expected = PROCESSOR(images=[images[i] for i in (2, 0, 1)], return_tensors="pt")["pixel_values"]
    assert torch.equal(chunk.pixel_values, expected)


def test_unreadable_images_are_left_out_and_counted():
    reader = ImageReader(cells_with_broken(10, {0, 1, 5}), PROCESSOR)
    chunks = list(reader.chunks(range(10), 2))
    assert [chunk.indices for chunk in chunks] == [(2, 3), (4,), (6, 7), (8, 9)]
    assert [chunk.number for chunk in chunks] == [1, 2, 3, 4]
    assert all(len(chunk.pixel_values) == len(chunk.indices) for chunk in chunks)
    reader.check_readable(range(10))
    assert reader.unreadable == {0, 1, 5}


def test_more_unreadable_images_than_readable_ones_are_an_error():
    reader = ImageReader(cells_with_broken(9, {0, 2, 4, 6, 8}), PROCESSOR)
    list(reader.chunks(range(9), 4))
    with pytest.raises(InputError, match="5 of 9 images cannot be read, the first in row 0"):
        reader.check_readable(range(9))
    reader.check_readable(range(1, 8))  # three of these seven


def test_data_set_rows_are_decoded_and_labels_stay_with_the_caller(tmp_path: Path):
    rows = datasets.Dataset.from_dict(
        {"picture": [png(row) for row in range(12)], "label": [row % 3 for row in range(12)]}
    )
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    images, opened = open_calibration_set(str(tmp_path / "rows.parquet"), PROCESSOR, calibration_images=6, seed=1)
    assert (len(images.fit), len(images.select), len(images.evaluation)) == (4, 2, 4)
    chunk = next(images.chunks(images.fit, 4))
    expected = PROCESSOR(images=[Image.open(io.BytesIO(png(row))) for row in images.fit], return_tensors="pt")
    assert torch.equal(chunk.pixel_values, expected["pixel_values"])
    assert opened[5]["label"] == 2


def test_the_record_says_which_rows_of_what_did_what():
    images = calibration_set(cells_with_broken(9, {2}), PROCESSOR, hold_out=True, seed=5)
    list(images.chunks(range(9), 3))
    record = images.to_dict()
    assert (record["seed"], record["fit"], record["selection"], record["evaluation"]) == (5, 4, 2, 3)
    assert record["unreadable"] == 1 and record["unreadable_indices"] == [2]
    assert record["indices"]["fit"] == list(images.fit)


def test_a_data_set_without_images_is_refused(tmp_path: Path):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(str(tmp_path / "rows.parquet"))
    with pytest.raises(InputError, match="no column holds images"):
        open_calibration_set(str(tmp_path / "rows.parquet"), PROCESSOR)
    with pytest.raises(InputError, match="there are none"):
        calibration_set([], PROCESSOR)


def test_streams_are_refused():
    stream = datasets.Dataset.from_dict({"image": [png(0)]}).to_iterable_dataset()
    with pytest.raises(InputError, match="streamed"):
        ImageReader(stream, PROCESSOR)
