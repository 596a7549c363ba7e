# SPDX-License-Identifier: Apache-2.0
"""Rows of a stream in an order that (seed, epoch, shard, row) decide for given readers; gone on with from counters.

A *reader* is one of `readers` that share the stream: a loader's worker, or a process without workers. In every epoch
the shards are dealt to the readers like cards, whole shards where there are enough of them; where there are fewer than
readers, a shard is read by several and its rows are dealt by their number. A reader takes its shards in a shuffled
order, a few of them open and read in turn; the rows that come are cut into blocks, and each block is shuffled. So a
place in the stream is a handful of numbers, and going back to it means to open the shards that were open, pass over
the rows read from them without decoding any, and fill one block.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

import fsspec
import numpy as np
from datasets import Dataset, IterableDataset
from torch.utils.data import get_worker_info

from ..errors import TrainingError
from .loading import encoded_bytes, undecoded


OPEN_SHARDS = 4
BLOCK_ROWS = 1000
# Images of a folder travel as paths of a hundred bytes, and lie there in the order of their classes.
BLOCK_PATHS = 100_000
_RESHARDED_BELOW = 64
_SAMPLED_SHARDS = 16
_READ_AT_ONCE = 16

# {"epoch", "block", "taken"}: rows taken of that block of that epoch; {"next", "turn", "open"}: where it begins, as
# the position of the shard to open next, whose turn it is, and [position, rows passed] of every open shard.
Place = dict[str, Any]
START: Place = {"epoch": 0, "block": 0, "taken": 0, "next": 0, "turn": 0, "open": []}


class StreamError(TrainingError):
    """A stream that cannot be read on. One line, also after a DataLoader worker raised it."""

    def __init__(self, message: str):
        # torch hands a worker's exception on with its traceback put before the message
        super().__init__(message.rpartition("StreamError: ")[2].strip())


class Piece(NamedTuple):
    """What one reader reads of one shard in one epoch: the rows whose number leaves `offset` when divided by `deal`.

    `index` is the shard's number in the reader's part of the stream, `shard` in the whole.
    """

    shard: int
    index: int  # type: ignore[assignment]
    offset: int
    deal: int


class StreamedRow(NamedTuple):
    """A row with the names of its shard and number, and the place to go on from after it."""

    epoch: int
    shard: int
    number: int
    cells: dict[str, Any]
    place: Place


class ShuffledStream:
    """The rows of an `IterableDataset`, undecoded, epoch after epoch in a shuffled order.

    Args:
        stream: not shuffled.
        columns: those wanted.
        seed: with epoch, shard and row it decides the order.
        readers: that share the stream.
        in_one: leave the stream in one piece, whatever its shards: what `.take(n)` gave would otherwise be `n` rows
            spread over all shards and not the first ones.
        block_rows: shuffled together, and held undecoded by each reader; by default 1,000, or 100,000 where rows
            hold paths of images and not the images.
        open_shards: read in turn.

    Attributes:
        layout: what a place depends on beside seed and readers, and a fingerprint of the first row, by which other
            data is recognised; plain values.
    """

    def __init__(
        self,
        stream: IterableDataset,
        columns: Sequence[str],
        seed: int,
        readers: int = 1,
        in_one: bool = False,
        block_rows: int | None = None,
        open_shards: int = OPEN_SHARDS,
    ) -> None:
        rows = undecoded(stream.select_columns(list(columns)))
        if not in_one and rows.num_shards < min(readers * open_shards, _RESHARDED_BELOW):
            rows = rows.reshard()  # row groups of a few parquet files; other formats stay as they are
        first = _first_row(rows)
        self.stream = rows
        self.seed = seed
        self.readers = readers
        self.shards = 1 if in_one else rows.num_shards
        self.block_rows = block_rows or (BLOCK_PATHS if any(map(_is_path, first.values())) else BLOCK_ROWS)
        self.open_shards = open_shards
        self.first_row = _fingerprint(first)

    @property
    def layout(self) -> dict[str, int | str]:
        return {
            "shards": self.shards,
            "block_rows": self.block_rows,
            "open_shards": self.open_shards,
            "first_row": self.first_row,
        }

    @property
    def readers_of_a_shard(self) -> int:
        """1 where every reader has whole shards of its own."""
        return 1 if self.shards >= self.readers else -(-self.readers // self.shards)

    def rows(self, reader: int = 0, place: Place = START) -> Iterator[StreamedRow]:
        """One reader's rows without end, going on from `place`.

        Raises:
            StreamError: a shard cannot be read, or no rows come at all.
        """
        if get_worker_info() is not None:
            fsspec.asyn.reset_lock()  # as `datasets` does: a lock copied by a fork would never open
        last_with_rows = place["epoch"]
        for epoch in count(place["epoch"]):
            for row in self.epoch_rows(epoch, reader, place if epoch == place["epoch"] else START):
                last_with_rows = epoch
                yield row
            if epoch - last_with_rows > self.readers:
                raise StreamError(f"the stream gave no rows in {epoch - last_with_rows} epochs; is its data gone?")

    def epoch_rows(self, epoch: int, reader: int = 0, place: Place = START) -> Iterator[StreamedRow]:
        """One reader's rows of one epoch, going on from `place`."""
        share = (reader + epoch) % self.readers  # in turn, as some shares hold a shard more
        open_shards = _OpenShards(self._shards_of(share), self._pieces(share, epoch), self.open_shards, place)
        number, taken = place["block"], place["taken"]
        begin = open_shards.place
        block: list[Any] = list(islice(open_shards, self.block_rows))
        while block:
            after = open_shards.place
            # the next block is read row by row while this one is used up, so that no more than one is held
            upcoming: list[Any] = []
            for position, index in enumerate(self._order(len(block), epoch, share, number)):
                (shard, row, cells), block[index] = block[index], None
                if position >= taken:
                    here = {"epoch": epoch, "block": number, "taken": position + 1, **begin}
                    yield StreamedRow(epoch, shard, row, cells, here)
                    upcoming.extend(islice(open_shards, 1))
            upcoming.extend(islice(open_shards, self.block_rows - len(upcoming)))
            block, begin, number, taken = upcoming, after, number + 1, 0

    def _shards_of(self, share: int) -> Callable[[int], IterableDataset]:
        """Opens a shard by its number in the share, or in the stream where shares are made of rows."""
        if self.shards == 1:
            return lambda index: self.stream
        part = self.stream
        if self.readers_of_a_shard == 1:
            part = part.shard(self.readers, share, contiguous=False)
        return lambda index: part.shard(part.num_shards, index)

    def _pieces(self, share: int, epoch: int) -> list[Piece]:
        """What the share consists of, in the epoch's order."""
        deal = self.readers_of_a_shard
        dealt = range(share, self.shards * deal, self.readers)
        pieces = [
            Piece(number % self.shards, index if deal == 1 else number % self.shards, number // self.shards, deal)
            for index, number in enumerate(dealt)
        ]
        return [pieces[index] for index in self._order(len(pieces), epoch, share)]

    def _order(self, length: int, *words: int) -> list[int]:
        text = ":".join(map(str, (self.seed, self.readers, *words)))
        key = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).permutation(length).tolist()


class _OpenShards:
    """Rows of pieces, of which a few are open and read in turn: (shard, row number, cells)."""

    def __init__(
        self, shard: Callable[[int], IterableDataset], pieces: Sequence[Piece], limit: int, place: Place
    ) -> None:
        self.shard = shard
        self.pieces = pieces
        self.limit = limit
        self.next = place["next"]
        self.turn = place["turn"]
        if any(position >= len(pieces) for position, _ in place["open"]):
            raise StreamError("the place to go on from is not one of this stream")
        self.open = [self._opened(position, passed) for position, passed in place["open"]]

    @property
    def place(self) -> Place:
        return {"next": self.next, "turn": self.turn, "open": [lane[:2] for lane in self.open]}

    def __iter__(self) -> "_OpenShards":
        return self

    def __next__(self) -> tuple[int, int, dict[str, Any]]:
        while True:
            while len(self.open) < self.limit and self.next < len(self.pieces):
                self.open.append(self._opened(self.next, 0))
                self.next += 1
            if not self.open:
                raise StopIteration
            self.turn %= len(self.open)
            position, _, rows = self.open[self.turn]
            found = next(rows, None)
            if found is not None:
                number, cells = found
                self.open[self.turn][1] = number + 1
                self.turn += 1
                return self.pieces[position].shard, number, cells
            del self.open[self.turn]

    def _opened(self, position: int, passed: int) -> list[Any]:
        return [position, passed, _piece_rows(self.shard, self.pieces[position], passed)]


def _piece_rows(
    open_shard: Callable[[int], IterableDataset], piece: Piece, passed: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, cells) of a piece's rows from number `passed` on."""
    number = passed
    try:
        shard = open_shard(piece.index)
        # not by plain iteration, which in a worker would share the rows out once more
        for columns in (shard.skip(passed) if passed else shard).iter(batch_size=_READ_AT_ONCE):
            for cells in zip(*columns.values(), strict=True):
                if number % piece.deal == piece.offset:
                    yield number, dict(zip(columns, cells))
                number += 1
    except Exception as error:  # whatever a file system, an archive or a format raises
        reason = " ".join(str(error).split())
        raise StreamError(
            f"shard {piece.shard} of the stream cannot be read from row {number} on ({type(error).__name__}: {reason})"
        ) from error


def sample_rows(
    stream: IterableDataset, columns: Sequence[str], count: int, seed: int = 0, in_one: bool = False
) -> Dataset:
    """At most `count` rows of a stream, undecoded, in memory: the same ones whenever and wherever they are drawn.

    They come from the first rows of shards drawn at random, 16 of them read in turn where there are as many; `in_one`
    as for `ShuffledStream`.

    Raises:
        StreamError: a shard cannot be read.
    """
    shuffled = ShuffledStream(stream, columns, seed, in_one=in_one, open_shards=_SAMPLED_SHARDS)
    rows = [row.cells for row in islice(shuffled.epoch_rows(0), count)]
    return Dataset.from_list(rows, features=shuffled.stream.features)


def _first_row(rows: IterableDataset) -> dict[str, Any]:
    """Its cells; none where there is no row."""
    for columns in rows.iter(batch_size=1):
        return {name: values[0] for name, values in columns.items()}
    return {}


def _is_path(cell: Any) -> bool:
    """Whether a cell holds an image's path and no image."""
    return isinstance(cell, dict) and bool(cell.get("path")) and not cell.get("bytes")


def _fingerprint(cells: dict[str, Any]) -> str:
    """The same wherever the data lies: of an image's path, the file that it leads to counts."""
    digest = hashlib.blake2b(digest_size=8)
    for name, cell in sorted(cells.items()):
        content = cell
        if _is_path(cell) or (isinstance(cell, dict) and cell.get("bytes")):
            try:
                content = encoded_bytes(cell)
            except (OSError, ValueError):
                content = "unreadable"
        digest.update(name.encode())
        digest.update(content if isinstance(content, bytes) else repr(content).encode())
    return digest.hexdigest()
