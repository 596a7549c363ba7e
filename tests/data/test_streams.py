"""The order of a stream: every row once an epoch, whoever reads it, and gone on with from plain numbers."""

import json
from itertools import islice
from pathlib import Path

import pytest
from datasets import IterableDataset

from hf_simprune.data.decoding import decode_image
from hf_simprune.data.loading import encoded_bytes, find_image_column, load_split, undecoded
from hf_simprune.data.streams import BLOCK_PATHS, BLOCK_ROWS, ShuffledStream, StreamError, sample_rows

from .stream_files import FORMATS, picture, write_parquet_shards


SIZES = (7, 3, 1, 11, 5)
ROWS = sum(SIZES)
PIXELS = {decode_image(picture(number)).numpy().tobytes(): number for number in range(ROWS)}


@pytest.fixture(scope="module", params=FORMATS)
def files(request, tmp_path_factory) -> str:
    return FORMATS[request.param](tmp_path_factory.mktemp("streams") / request.param, SIZES)


def opened(files: str, readers: int, **options) -> ShuffledStream:
    stream = load_split(files, "train", streaming=True)
    settings = {"seed": 7, "block_rows": 4, "open_shards": 2, **options}
    return ShuffledStream(stream, [find_image_column(stream)], readers=readers, **settings)


def numbers(rows) -> list[int]:
    """Which pictures these are, by their pixels."""
    return [PIXELS[decode_image(encoded_bytes(*row.cells.values())).numpy().tobytes()] for row in rows]


def names(rows) -> list[tuple[int, int, int]]:
    return [(row.epoch, row.shard, row.number) for row in rows]


class Counted:
    """A stream made in memory that counts which rows of which shard were read."""

    def __init__(self, shards: int, rows: int) -> None:
        self.read: list[tuple[int, int]] = []

        def generate(shard: list[int]):
            for number in shard:
                for row in range(rows):
                    self.read.append((number, row))
                    yield {"label": rows * number + row}

        self.stream = IterableDataset.from_generator(generate, gen_kwargs={"shard": list(range(shards))})


@pytest.mark.parametrize("readers", [1, 2, 4, 7])
def test_every_row_is_read_once_an_epoch_by_one_of_the_readers(files, readers):
    stream = opened(files, readers)
    orders = []
    for epoch in range(3):
        read = [numbers(stream.epoch_rows(epoch, reader)) for reader in range(readers)]
        together = [number for part in read for number in part]
        assert sorted(together) == list(range(ROWS))
        orders.append(read)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("readers", [1, 3])
def test_reading_goes_on_from_every_place_without_losing_or_repeating_a_row(files, readers):
    stream = opened(files, readers)
    epoch = len(list(stream.epoch_rows(0)))
    undisturbed = list(islice(stream.rows(), epoch + 12))
    assert epoch > 6 and undisturbed[epoch].epoch == 1
    # the beginning, the edges of blocks of 4, the middle, both sides of the epoch's edge, the next epoch
    for stop in (1, 3, 4, 5, epoch - 1, epoch, epoch + 1, epoch + 9):
        place = json.loads(json.dumps(undisturbed[stop - 1].place))
        resumed = list(islice(opened(files, readers).rows(0, place), len(undisturbed) - stop))
        assert names(resumed) == names(undisturbed[stop:])
        assert numbers(resumed) == numbers(undisturbed[stop:])
        assert [row.place for row in resumed] == [row.place for row in undisturbed[stop:]]


def test_the_order_is_decided_by_seed_and_epoch_alone(tmp_path: Path):
    files = write_parquet_shards(tmp_path / "set", [9, 9, 9])
    first = [names(opened(files, 2, seed=seed).epoch_rows(epoch)) for seed in (1, 2) for epoch in (0, 2)]
    again = [names(opened(files, 2, seed=seed).epoch_rows(epoch)) for seed in (1, 2) for epoch in (0, 2)]
    assert first == again
    assert len({tuple(row[1:] for row in order) for order in first}) == 4


def test_a_block_is_shuffled_and_drawn_from_several_shards():
    source = Counted(shards=8, rows=50)
    stream = ShuffledStream(source.stream, ["label"], seed=0, block_rows=100, open_shards=4)
    block = [row.cells["label"] for row in islice(stream.epoch_rows(0), 100)]
    assert [sum(number // 50 == shard for number in block) for shard in {number // 50 for number in block}] == [25] * 4
    neighbours = sum(abs(a - b) == 1 for a, b in zip(block, block[1:]))
    assert neighbours < 10 and block != sorted(block)


@pytest.mark.parametrize("readers", [1, 2, 4, 8])
def test_readers_open_no_shards_but_their_own_where_there_are_enough(readers):
    source = Counted(shards=8, rows=5)
    stream = ShuffledStream(source.stream, ["label"], seed=0, readers=readers, block_rows=4, open_shards=2)
    source.read.clear()
    opened_by = []
    for reader in range(readers):
        list(stream.epoch_rows(1, reader))
        opened_by.append({shard for shard, _ in source.read})
        assert len(source.read) == 40 // readers  # each row read once, none passed over
        source.read.clear()
    assert sum(map(len, opened_by)) == 8 == len(set().union(*opened_by))


def test_shares_with_a_shard_more_go_round():
    stream = ShuffledStream(Counted(shards=5, rows=3).stream, ["label"], seed=0, readers=2)
    counts = [[len(list(stream.epoch_rows(epoch, reader))) for epoch in range(4)] for reader in range(2)]
    assert counts == [[9, 6, 9, 6], [6, 9, 6, 9]]


def test_no_more_than_a_block_is_held():
    source = Counted(shards=6, rows=200)
    stream = ShuffledStream(source.stream, ["label"], seed=0, block_rows=100, open_shards=3)
    source.read.clear()
    ahead = [len(source.read) - taken for taken, _ in enumerate(stream.epoch_rows(0), start=1)]
    assert max(ahead) <= 100 + 3 * 16  # rows come from a shard 16 at a time


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_resuming_reads_one_block_and_the_open_shards_only(share):
    source = Counted(shards=40, rows=50)
    stream = ShuffledStream(source.stream, ["label"], seed=0, block_rows=100, open_shards=4)
    place = next(islice(stream.epoch_rows(0), int(share * 2000) - 1, None)).place
    source.read.clear()
    next(stream.rows(0, place))
    assert len(source.read) <= 100 + 4 * 50 + 4 * 16
    assert len({shard for shard, _ in source.read}) <= 2 * 4


def test_row_groups_are_the_shards_of_a_few_parquet_files(tmp_path: Path):
    files = write_parquet_shards(tmp_path / "set", [12, 8], row_group_size=4)
    stream = opened(files, 4)
    assert stream.shards == 5 and stream.readers_of_a_shard == 1
    assert sorted(n for reader in range(4) for n in numbers(stream.epoch_rows(0, reader))) == list(range(20))


@pytest.mark.parametrize("readers", [1, 2, 9])
def test_a_stream_in_one_piece_gives_its_first_rows_however_many_read_it(files, readers):
    first = load_split(files, "train", streaming=True).take(8)
    column = find_image_column(first)
    stream = ShuffledStream(first, [column], seed=7, readers=readers, in_one=True, block_rows=4)
    whole = undecoded(load_split(files, "train"))
    wanted = {encoded_bytes(cell) for cell in whole[:8][column]}
    for epoch in range(2):
        read = [encoded_bytes(r.cells[column]) for reader in range(readers) for r in stream.epoch_rows(epoch, reader)]
        assert len(read) == 8 and set(read) == wanted


def test_rows_that_are_paths_make_larger_blocks(tmp_path: Path):
    for name, rows in (("imagefolder", BLOCK_PATHS), ("parquet", BLOCK_ROWS), ("webdataset", BLOCK_ROWS)):
        files = FORMATS[name](tmp_path / name, [3])
        assert opened(files, 1, block_rows=None).block_rows == rows


def test_a_shard_that_cannot_be_read_is_named(tmp_path: Path):
    files = FORMATS["webdataset"](tmp_path / "set", [4, 4])
    stream = opened(files, 1)
    broken = tmp_path / "set" / "train-1.tar"
    broken.write_bytes(broken.read_bytes()[:2600])
    with pytest.raises(StreamError, match=r"^shard 1 of the stream cannot be read from row [0-4] on \(.*\)$"):
        list(stream.epoch_rows(0))


def test_empty_shards_are_passed_over(tmp_path: Path):
    stream = opened(FORMATS["webdataset"](tmp_path / "set", [4, 0, 3]), 2)
    assert sorted(n for reader in range(2) for n in numbers(stream.epoch_rows(0, reader))) == list(range(7))


def test_a_stream_without_rows_ends_with_an_error():
    source = Counted(shards=2, rows=0)
    with pytest.raises(StreamError, match="no rows"):
        next(ShuffledStream(source.stream, ["label"], seed=0, block_rows=4).rows())


def test_a_sample_is_the_same_whenever_it_is_drawn_and_comes_from_many_shards(files):
    stream = load_split(files, "train", streaming=True)
    column = find_image_column(stream)
    drawn = [sample_rows(stream, [column], 12, seed)[column] for seed in (3, 3, 4)]
    cells = [[encoded_bytes(cell) for cell in column] for column in drawn]
    assert cells[0] == cells[1] != cells[2]
    assert len(set(cells[0])) == 12
    assert len(sample_rows(stream, [column], 1000)) == ROWS
    many = Counted(shards=100, rows=50)
    sample = sample_rows(many.stream, ["label"], 400)["label"]
    assert len({number // 50 for number in sample}) >= 16
