# SPDX-License-Identifier: Apache-2.0
"""Multi-crop examples of a data set that is read as a stream and never held."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any, Literal

import datasets
import torch
from datasets.distributed import split_dataset_by_node

from ..data.decoding import DECODING_ERRORS
from ..data.loading import encoded_bytes, image_rows
from ..errors import InputError
from .augmentation import AugmentationConfig
from .batch import Batch
from .crops import make_views
from .data import MAX_BAD_IN_A_ROW, bad_image_error, too_many_bad_images


_INTERLEAVED_SHARDS = 10


def content_key(encoded: bytes) -> int:
    """Key of an example whose row number nobody knows: 63 bits of a hash of its bytes.

    It does not change with the shard, rank, worker or shuffle that delivered it.
    """
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little") >> 1


class StreamingMultiCropDataset(torch.utils.data.IterableDataset):
    """Endless examples for `batch.collate`, epoch after epoch, for a DataLoader with `batch_size=per_device_batch`.

    Each process and worker reads its own share (whole shards where their number allows it, see
    `datasets.distributed.split_dataset_by_node`), through a shuffle buffer seeded by (seed, epoch). The same image
    gets the same crops in the same epoch wherever it is read. An unreadable image's place is taken by the next
    readable one of the same share; `index` counts the rows of the share, `bad_indices` are such counts.

    Args:
        dataset: an `IterableDataset`.
        image_column, cfg, seed, on_bad_image: as for `MultiCropDataset`.
        world_size, rank: processes, and this one's number.
        num_workers: of the DataLoader, 0 for none.
        batch_size: of the DataLoader; `start_batch` counts in it.
        start_batch: batches of this process to pass over when resuming (read the loader through `resumed`); their rows
            are read again but not decoded.
        shuffle_buffer: rows held per worker.

    Raises InputError when there are more workers than shards for them.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        image_column: str,
        cfg: AugmentationConfig,
        seed: int,
        batch_size: int,
        on_bad_image: Literal["skip", "error"] = "skip",
        world_size: int = 1,
        rank: int = 0,
        num_workers: int = 0,
        start_batch: int = 0,
        shuffle_buffer: int = 1000,
    ):
        shards = dataset.num_shards // world_size if dataset.num_shards % world_size == 0 else dataset.num_shards
        if num_workers > shards:
            raise InputError(
                f"--dataloader_num_workers {num_workers}: this stream has {shards} shard(s) for each process, and "
                f"workers share whole ones; give at most {shards}"
            )
        # reading one shard "interleaved" would gain nothing and end every epoch with seconds of waiting for threads
        interleaved = min(_INTERLEAVED_SHARDS, dataset.num_shards)
        shuffled = image_rows(dataset, image_column).shuffle(
            seed=seed, buffer_size=shuffle_buffer, max_buffer_input_shards=interleaved
        )
        self.stream = split_dataset_by_node(shuffled, rank=rank, world_size=world_size)
        self.image_column = image_column
        self.cfg = cfg
        self.seed = seed
        self.batch_size = batch_size
        self.on_bad_image = on_bad_image
        self.start_batch = start_batch
        self.workers = max(1, num_workers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        passed = self._rows_passed()
        bad: list[int] = []
        # keys of unreadable rows still waiting for the next readable one
        waiting: list[tuple[int, int]] = []
        for index, (epoch, cell) in enumerate(self._cells()):
            if index < passed:
                continue
            key = index
            try:
                encoded = encoded_bytes(cell)
                key = content_key(encoded)
                views = self._views(encoded, epoch, key)
            except DECODING_ERRORS as error:
                if self.on_bad_image == "error":
                    raise bad_image_error(index, error) from error
                bad.append(index)
                waiting.append((epoch, key))
                if len(bad) == MAX_BAD_IN_A_ROW:
                    raise too_many_bad_images(bad[0]) from error
                continue
            for position, (other_epoch, other_key) in zip(bad, waiting):
                yield {**self._views(encoded, other_epoch, other_key), "index": position, "bad_indices": [position]}
            bad, waiting = [], []
            yield {**views, "index": index, "bad_indices": []}

    def _views(self, encoded: bytes, epoch: int, key: int) -> dict[str, Any]:
        return make_views(encoded, self.cfg, self.seed, epoch, key)

    def _cells(self) -> Iterator[tuple[int, Any]]:
        for epoch in count():
            self.stream.set_epoch(epoch)
            empty = True
            for row in self.stream:
                empty = False
                yield epoch, row[self.image_column]
            if empty:
                return

    def _rows_passed(self) -> int:
        """Rows of this worker's share in the whole rounds of batches before `start_batch`.

        A row is one example, readable or not, so rows and examples count alike.
        """
        return self.start_batch // self.workers * self.batch_size

    def resumed(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The loader's batches from `start_batch` on: drops those of a begun round, as a loader starts at worker 0."""
        return islice(loader, self.start_batch % self.workers, None)
