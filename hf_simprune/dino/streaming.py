# SPDX-License-Identifier: Apache-2.0
"""Multi-crop examples of a data set that is read as a stream and never held."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..data.decoding import DECODING_ERRORS
from ..data.loading import encoded_bytes
from ..data.streams import START, Place, ShuffledStream, StreamedRow
from .augmentation import AugmentationConfig
from .batch import Batch, collate
from .crops import make_views
from .data import MAX_BAD_IN_A_ROW, OnBadImage, bad_image_error, too_many_bad_images


def content_key(encoded: bytes) -> int:
    """Key of an example whose row number nobody knows: 63 bits of a hash of its bytes.

    It does not change with the shard, rank, worker or shuffle that delivered it.
    """
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little") >> 1


class StreamBatch(NamedTuple):
    """A batch, and the place of its reader after it."""

    batch: Batch
    place: Place


def collate_with_place(examples: Sequence[dict[str, Any]]) -> StreamBatch:
    """As `batch.collate`, for the examples of one `StreamingMultiCropDataset`."""
    return StreamBatch(collate(examples), examples[-1]["place"])


class StreamingMultiCropDataset(torch.utils.data.IterableDataset):
    """Endless examples for `collate_with_place`, epoch after epoch, for a DataLoader of `len(places)` workers or none.

    Each worker reads its own share of a `ShuffledStream`. The same image gets the same crops in the same epoch
    wherever it is read. An unreadable image's place is taken by the next readable one of the same share, cropped
    unlike that one's own. An example is what `make_views` returns with `index` (its key), `bad_indices` (the name of
    the unreadable image that it stands for, if it does) and `place` (its reader's, after it).

    Args:
        rows: the stream, with a reader for every worker of every process.
        image_column: the column of `rows` that holds the images.
        cfg, seed, on_bad_image: as for `MultiCropDataset`.
        rank: of this process.
        places: where the readers of this process begin.
        first: which of them worker 0 is, as a loader always asks worker 0 first.
    """

    def __init__(
        self,
        rows: ShuffledStream,
        image_column: str,
        cfg: AugmentationConfig,
        seed: int,
        on_bad_image: OnBadImage = "skip",
        rank: int = 0,
        places: Sequence[Place] = (START,),
        first: int = 0,
    ):
        self.rows = rows
        self.image_column = image_column
        self.cfg = cfg
        self.seed = seed
        self.on_bad_image = on_bad_image
        self.rank = rank
        self.places = places
        self.first = first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        number = (self.first + (info.id if info is not None else 0)) % len(self.places)
        # unreadable rows still waiting for the next readable one; each yields one example, so that a place counts both
        waiting: list[tuple[StreamedRow, int]] = []
        for row in self.rows.rows(self.rank * len(self.places) + number, self.places[number]):
            key = content_key(f"{row.shard}:{row.number}".encode())
            try:
                encoded = encoded_bytes(row.cells[self.image_column])
                key = content_key(encoded)
                views = self._views(encoded, row.epoch, key)
            except DECODING_ERRORS as error:
                if self.on_bad_image == "error":
                    raise bad_image_error(self._name(row), error) from error
                waiting.append((row, key))
                if len(waiting) == MAX_BAD_IN_A_ROW:
                    raise too_many_bad_images(self._name(waiting[0][0])) from error
                continue
            for bad, bad_key in waiting:
                stand_in = self._views(encoded, bad.epoch, bad_key)
                yield {**stand_in, "index": bad_key, "bad_indices": [self._name(bad)], "place": bad.place}
            waiting = []
            yield {**views, "index": key, "bad_indices": [], "place": row.place}

    def _views(self, encoded: bytes, epoch: int, key: int) -> dict[str, Any]:
        return make_views(encoded, self.cfg, self.seed, epoch, key)

    def _name(self, row: StreamedRow) -> str:
        """The same in every epoch and for every reader."""
        cell = row.cells[self.image_column]
        path = cell.get("path") if isinstance(cell, dict) else None
        return f"{row.number} of shard {row.shard}" + (f" ({path})" if path else "")
