# SPDX-License-Identifier: Apache-2.0
"""Multi-crop examples of a data set of known length, and its in-memory cache when it is small."""

import logging
import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..data.decoding import DECODING_ERRORS, decode_image, image_size
from ..data.loading import encoded_bytes, image_rows
from ..errors import TrainingError
from .augmentation import AugmentationConfig
from .crops import make_views


logger = logging.getLogger(__name__)

CACHE_LIMIT_BYTES = 256 * 2**20
MAX_BAD_IN_A_ROW = 100
MAX_LISTED = 20

OnBadImage = Literal["skip", "error"]


class BadImageError(TrainingError):
    """An image that cannot be read, where that stops the run. One line, also after a DataLoader worker raised it."""

    def __init__(self, message: str):
        # torch hands a worker's exception on with its traceback put before the message
        super().__init__(message.rpartition("BadImageError: ")[2].strip())


class PixelCache:
    """Decoded images side by side in one tensor, which forked and spawned workers share.

    `cache[i]` is uint8 (H, W, 3), or None where the bytes could not be read.
    """

    def __init__(self, images: Sequence[Tensor | None]):
        shapes = [(0, 0) if image is None else tuple(image.shape[:2]) for image in images]
        self._shapes = np.array(shapes, dtype=np.int64).reshape(-1, 2)
        self._starts = np.concatenate([[0], np.cumsum(3 * self._shapes.prod(axis=1))])
        self._pixels = torch.empty(int(self._starts[-1]), dtype=torch.uint8)
        for image, start, end in zip(images, self._starts, self._starts[1:]):
            if image is not None:
                self._pixels[start:end] = image.flatten()

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return self._pixels.numel()

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: int) -> Tensor | None:
        height, width = self._shapes[index].tolist()
        if height == 0:
            return None
        return self._pixels[self._starts[index] : self._starts[index + 1]].view(height, width, 3)


def decode_small_set(dataset: Dataset, image_column: str, limit: int = CACHE_LIMIT_BYTES) -> PixelCache | None:
    """All images of a data set decoded, or None when they would take more than `limit` bytes.

    The first readable image's size times the number of rows decides, before anything is decoded; a set that turns out
    larger is given up half way.
    """
    rows = image_rows(dataset, image_column)
    if _estimated_bytes(rows, image_column) > limit:
        return None
    images: list[Tensor | None] = []
    total = 0
    for row in rows:
        images.append(_decode_or_none(row[image_column]))
        total += 0 if images[-1] is None else images[-1].numel()
        if total > limit:
            return None
    cache = PixelCache(images)
    logger.info("holding %d decoded images (%.1f MB) in memory", len(cache), cache.nbytes / 1e6)
    return cache


def _estimated_bytes(rows: Dataset, image_column: str) -> int:
    for index in range(min(len(rows), MAX_BAD_IN_A_ROW)):
        try:
            width, height = image_size(encoded_bytes(rows[index][image_column]))
        except DECODING_ERRORS:
            continue
        return 3 * width * height * len(rows)
    return 0


def _decode_or_none(cell: Any) -> Tensor | None:
    try:
        return decode_image(encoded_bytes(cell))
    except DECODING_ERRORS:
        return None


class MultiCropDataset(torch.utils.data.Dataset):
    """Examples for `batch.collate`, indexed by the (epoch, index) pairs of `GlobalBatchSampler`.

    Args:
        dataset: rows of a `datasets.Dataset`.
        image_column: as `find_image_column` names it.
        cfg: crops and their probabilities.
        seed: with epoch and index it decides every random choice of an example.
        on_bad_image: "skip" puts the next readable image in the place of one that cannot be read and notes its index
            under `bad_indices`; "error" raises BadImageError with the index.
        cache: decoded images of the same rows, as `decode_small_set` gives them.

    An item is what `make_views` returns, `index` and `bad_indices`. Raises BadImageError after 100 unreadable images
    in a row.
    """

    def __init__(
        self,
        dataset: Dataset,
        image_column: str,
        cfg: AugmentationConfig,
        seed: int,
        on_bad_image: OnBadImage = "skip",
        cache: PixelCache | None = None,
    ):
        self.rows = image_rows(dataset, image_column)
        self.image_column = image_column
        self.cfg = cfg
        self.seed = seed
        self.on_bad_image = on_bad_image
        self.cache = cache

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: tuple[int, int]) -> dict[str, Any]:
        epoch, index = position
        bad: list[int] = []
        for offset in range(MAX_BAD_IN_A_ROW):
            candidate = (index + offset) % len(self)
            try:
                # the key stays the asked-for index, so a replacement is cropped unlike its original
                views = make_views(self._image(candidate), self.cfg, self.seed, epoch, index)
            except DECODING_ERRORS as error:
                if self.on_bad_image == "error":
                    raise bad_image_error(candidate, error) from error
                bad.append(candidate)
                continue
            return {**views, "index": index, "bad_indices": bad}
        raise too_many_bad_images(index)

    def _image(self, index: int) -> bytes | Tensor:
        if self.cache is None:
            return encoded_bytes(self.rows[index][self.image_column])
        pixels = self.cache[index]
        if pixels is None:
            raise ValueError("its bytes are no readable image")
        return pixels


def bad_image_error(index: int | str, cause: Exception) -> BadImageError:
    """What `--on_bad_image error` raises."""
    reason = re.sub(r" ?<_io\.BytesIO[^>]*>", "", str(cause).partition("\n")[0])
    return BadImageError(f"image {index} cannot be read: {reason} (--on_bad_image skip goes on without such images)")


def too_many_bad_images(index: int | str) -> BadImageError:
    """What ends a run in which nothing readable follows."""
    return BadImageError(f"{MAX_BAD_IN_A_ROW} images in a row cannot be read, beginning with image {index}")


def listed_images(indices: Collection[int | str]) -> str:
    """How many there are and the numbers of the first of them, in words."""
    numbers = sorted(indices)
    shown = ", ".join(map(str, numbers[:MAX_LISTED]))
    more = f" and {len(numbers) - MAX_LISTED} more, see training/run.json" if len(numbers) > MAX_LISTED else ""
    return f"{len(numbers)} ({shown}{more})"
