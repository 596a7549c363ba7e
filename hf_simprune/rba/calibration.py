# SPDX-License-Identifier: Apache-2.0
"""Which images an analysis reads, and reading them in chunks that are the same for any number of processes."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from ..data.decoding import DECODING_ERRORS, decode_image, load_pixels, oriented_size
from ..data.loading import encoded_bytes, find_image_column, image_rows, load_split
from ..errors import InputError
from .stream_rows import hold_rows


CALIBRATION_IMAGES = 500
_LEAST_IMAGES = 3  # two to fit, one to select
_SHOWN_UNREADABLE = 20


@dataclass(frozen=True)
class ImageSplit:
    """Row numbers for fitting maps, for choosing among plans and, held out from both, for evaluation."""

    fit: tuple[int, ...]
    select: tuple[int, ...]
    evaluation: tuple[int, ...] = ()


def split_images(
    rows: int, calibration_images: int = CALIBRATION_IMAGES, hold_out: bool = True, seed: int = 0
) -> ImageSplit:
    """A seeded, disjoint choice among `rows` rows, made before anything is read.

    With `hold_out` a third of the rows (rounded down) is kept for evaluation. Of the others `calibration_images`, or
    all there are, are for calibration: two thirds fit, the rest selects.

    Raises:
        InputError: fewer than 3 images to calibrate on, asked for or there.
    """
    if calibration_images < _LEAST_IMAGES:
        raise InputError(f"--calibration_images {calibration_images}: at least {_LEAST_IMAGES} are needed")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = rows // 3 if hold_out else 0
    calibration = order[held_out : held_out + calibration_images]
    if len(calibration) < _LEAST_IMAGES:
        raise InputError(
            f"--dataset_name_or_path: {rows} rows leave {len(calibration)} images to calibrate on; "
            f"at least {_LEAST_IMAGES} are needed"
        )
    fit = len(calibration) - len(calibration) // 3
    return ImageSplit(tuple(calibration[:fit]), tuple(calibration[fit:]), tuple(order[:held_out]))


class Chunk(NamedTuple):
    """Some images of one pass: their number in the pass, row numbers, and pixels (B, C, H, W) as the model takes them.

    Rows that could not be read are missing from both.
    """

    number: int
    indices: tuple[int, ...]
    pixel_values: Tensor


class ImageReader:
    """Images of a data set or a list, decoded when asked for and prepared by an image processor.

    Args:
        images: a `datasets.Dataset` with a column of images, or a sequence of PIL images, uint8 (H, W, 3) arrays or
            undecoded cells (bytes).
        processor: the model's image processor.
        image_column: of a data set, as `find_image_column` takes it.

    Attributes:
        unreadable: row numbers met so far whose image could not be read; they are left out of the chunks.

    Raises:
        InputError: a stream, no rows, or no column of images.
    """

    def __init__(
        self, images: Dataset | Sequence[Any], processor: BaseImageProcessor, image_column: str | None = None
    ):
        if isinstance(images, IterableDataset):
            raise InputError("images: a streamed data set has no row numbers; load it without streaming=True")
        if len(images) == 0:
            raise InputError("images: there are none")
        self._column: str | None = None
        self._rows: Any = images
        if isinstance(images, Dataset):
            self._column = find_image_column(images, image_column)
            self._rows = image_rows(images, self._column)
        self.processor = processor
        self.unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def pixels(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3) of one row. Raises one of DECODING_ERRORS when it cannot be read."""
        cell = self._rows[index] if self._column is None else self._rows[index][self._column]
        if isinstance(cell, Image.Image):
            return load_pixels(cell, oriented_size(cell)[2]).numpy()
        if isinstance(cell, (np.ndarray, Tensor)):
            return np.asarray(cell)
        return decode_image(encoded_bytes(cell)).numpy()

    def digest(self, index: int) -> bytes | None:
        """A hash of one row's stored bytes, None where there are none to read. For rows of a data set."""
        try:
            encoded = encoded_bytes(self._rows[index][self._column])
        except DECODING_ERRORS:
            return None
        return hashlib.blake2b(encoded, digest_size=16).digest()

    def prepare(self, images: Sequence[np.ndarray], **options: Any) -> Tensor:
        """(B, C, H, W) fp32 of uint8 (H, W, 3) arrays; `options` override the processor's own."""
        batch = self.processor(images=list(images), input_data_format="channels_last", return_tensors="pt", **options)
        return batch["pixel_values"]

    def chunks(
        self, indices: Sequence[int], chunk_size: int = 32, rank: int = 0, world: int = 1, progress: str | None = None
    ) -> Iterator[Chunk]:
        """The images of `indices`, `chunk_size` at a time; of `world` processes each reads every `world`-th chunk.

        What is in a chunk depends on neither; the last may be short. A chunk without a readable image is left out.
        `progress` names a bar on stderr.
        """
        numbers = range(rank, -(-len(indices) // chunk_size), world)
        for number in tqdm(numbers, desc=progress, disable=progress is None, leave=False):
            chosen = indices[number * chunk_size : (number + 1) * chunk_size]
            read = [(index, pixels) for index in chosen if (pixels := self.pixels_or_none(index)) is not None]
            if read:
                yield Chunk(number, tuple(i for i, _ in read), self.prepare([pixels for _, pixels in read]))

    def pixels_or_none(self, index: int) -> np.ndarray | None:
        """As `pixels`, but an image that cannot be read is noted in `unreadable` and gives None."""
        try:
            return self.pixels(index)
        except DECODING_ERRORS:
            self.unreadable.add(index)
            return None

    def check_readable(self, indices: Sequence[int], accelerator: Accelerator | None = None) -> None:
        """After a pass over `indices`: share among processes what could not be read.

        Raises:
            InputError: on every process, when that is more than half of `indices`.
        """
        if accelerator is not None and accelerator.num_processes > 1:
            self.unreadable = set(gather_object(sorted(self.unreadable)))
        bad = sorted(self.unreadable.intersection(indices))
        if 2 * len(bad) > len(indices):
            raise InputError(
                f"--dataset_name_or_path: {len(bad)} of {len(indices)} images cannot be read, the first in row "
                f"{bad[0]}; at most half may be unreadable"
            )


@dataclass
class CalibrationSet:
    """The images of an analysis: where they come from, and which rows do what.

    `source` (data set, configuration, split, revision) and `seed` are kept for the record only.
    """

    reader: ImageReader
    split: ImageSplit
    seed: int = 0
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def fit(self) -> tuple[int, ...]:
        """Rows that maps are fitted on."""
        return self.split.fit

    @property
    def select(self) -> tuple[int, ...]:
        """Rows that costs and plans are measured on."""
        return self.split.select

    @property
    def evaluation(self) -> tuple[int, ...]:
        """Rows held out from both; empty where evaluation has a split of its own."""
        return self.split.evaluation

    def chunks(
        self, indices: Sequence[int], chunk_size: int = 32, rank: int = 0, world: int = 1, progress: str | None = None
    ) -> Iterator[Chunk]:
        """As `ImageReader.chunks`."""
        return self.reader.chunks(indices, chunk_size, rank, world, progress)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: source, seed, how many images of each part, their row numbers, and what could not be read."""
        unreadable = sorted(self.reader.unreadable)
        return {
            **self.source,
            "seed": self.seed,
            "fit": len(self.fit),
            "selection": len(self.select),
            "evaluation": len(self.evaluation),
            "unreadable": len(unreadable),
            "indices": {"fit": list(self.fit), "selection": list(self.select), "evaluation": list(self.evaluation)},
            "unreadable_indices": unreadable[:_SHOWN_UNREADABLE],
        }


def calibration_set(
    images: Dataset | Sequence[Any],
    processor: BaseImageProcessor,
    calibration_images: int = CALIBRATION_IMAGES,
    hold_out: bool = False,
    seed: int = 0,
    image_column: str | None = None,
) -> CalibrationSet:
    """Images at hand as a calibration set; see `ImageReader` and `split_images` for what they may be."""
    reader = ImageReader(images, processor, image_column)
    return CalibrationSet(reader, split_images(len(reader), calibration_images, hold_out, seed), seed)


def open_calibration_set(
    dataset_name_or_path: str,
    processor: BaseImageProcessor,
    split: str = "train",
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    calibration_images: int = CALIBRATION_IMAGES,
    hold_out: bool = True,
    seed: int = 0,
    token: str | None = None,
    trust_remote_code: bool = False,
    held_rows: int | None = None,
    label_column: str | None = None,
) -> tuple[CalibrationSet, Dataset]:
    """Open a data set by name and choose the images; also the opened rows, for their labels.

    `hold_out` as for `split_images`: leave it on unless evaluation has a split of its own. With `held_rows` the data
    set is read as a stream, of which that many rows are drawn and held, with labels from `label_column`.

    Raises:
        InputError: as `load_split`, `find_image_column` and `split_images`.
    """
    rows = load_split(
        dataset_name_or_path,
        split,
        config_name,
        revision,
        streaming=held_rows is not None,
        token=token,
        trust_remote_code=trust_remote_code,
        split_option="--calibration_split",
    )
    if held_rows is not None:
        rows = hold_rows(rows, held_rows, image_column, label_column, seed)
    chosen = calibration_set(rows, processor, calibration_images, hold_out, seed, image_column)
    source = {
        "dataset": dataset_name_or_path,
        "config": config_name,
        "split": split,
        "revision": revision,
        "fingerprint": rows._fingerprint,
        "streamed": held_rows is not None,
    }
    return CalibrationSet(chosen.reader, chosen.split, seed, source), rows
