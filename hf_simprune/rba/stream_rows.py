# SPDX-License-Identifier: Apache-2.0
"""Rows of a stream to calibrate and evaluate on: a sample in memory, still encoded, the same for every process."""

from datasets import Dataset, IterableDataset

from ..data.loading import find_image_column, find_label_column, known_features
from ..data.streams import sample_rows


STREAMED_EVALUATION_IMAGES = 500


def rows_needed(calibration_images: int, evaluation_images: int | None, hold_out: bool) -> int:
    """Rows of a stream of which `split_images` makes as many images of each kind; it holds out a third."""
    if not hold_out:
        return calibration_images
    return 3 * max(-(-calibration_images // 2), evaluation_images or STREAMED_EVALUATION_IMAGES)


def hold_rows(
    stream: IterableDataset, count: int, image_column: str | None, label_column: str | None, seed: int
) -> Dataset:
    """At most `count` rows with images and labels, drawn as `sample_rows` says.

    Raises:
        InputError: no column of images, or no such column.
        StreamError: the stream cannot be read.
    """
    label = find_label_column(known_features(stream), label_column)
    columns = [find_image_column(stream, image_column), *([label] if label is not None else [])]
    return sample_rows(stream, columns, count, seed)


def about_held(rows: Dataset, name: str) -> str:
    """How much of a stream is in memory, for the terminal."""
    return f"stream: {len(rows):,} rows of {name} drawn and held in memory ({rows.data.nbytes / 1e6:.1f} MB)"
