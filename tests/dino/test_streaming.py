"""Streams as a trainer reads them: every example once an epoch, and exact resumption from counters."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_simprune.data.decoding import decode_image
from hf_simprune.data.loading import find_image_column, load_split
from hf_simprune.data.streams import ShuffledStream
from hf_simprune.dino.crops import make_views
from hf_simprune.dino.data import BadImageError, MultiCropDataset
from hf_simprune.dino.run_data import open_data
from hf_simprune.dino.streaming import StreamingMultiCropDataset, content_key
from hf_simprune.dino.view_source import OtherReadersError
from hf_simprune.dino.views import LoaderSource, StreamSource
from hf_simprune.errors import InputError, TrainingError

from ..data.stream_files import FORMATS, picture
from .image_files import CFG, one_line_naming
from .make_arguments import make_arguments


CPU = torch.device("cpu")
SIZES = (7, 2, 9, 4, 6)
KEYS = {content_key(picture(number)): number for number in range(sum(SIZES))}


def stream_source(
    files: str, workers: int = 0, world: int = 1, rank: int = 0, batch: int = 3, accumulation: int = 1,
    on_bad_image: str = "skip", block: int = 4,
) -> StreamSource:  # fmt: skip
    stream = load_split(files, "train", streaming=True)
    column = find_image_column(stream)
    rows = ShuffledStream(stream, [column], 5, world * max(1, workers), block_rows=block, open_shards=2)

    def opened(places, first):
        return StreamingMultiCropDataset(rows, column, CFG, 5, on_bad_image, rank, places, first)

    return StreamSource(opened, rows.layout, CFG, CPU, batch, accumulation, workers)


def crops_of(batch) -> list[bytes]:
    """Name each example by its crops, which only the image and the epoch decide."""
    return [batch.global_crops[:, position].numpy().tobytes() for position in range(len(batch))]


def read_steps(source, steps: int, start: int = 0) -> list:
    """(crops of the examples, state after them) of steps."""
    read = []
    for group in islice(source.batches(start), steps):
        read.append(([crops for batch in group for crops in crops_of(batch)], source.state_dict()))
    return read


def crops_in(epoch: int) -> set[bytes]:
    """Of every picture, made without any loader."""
    made = [make_views(picture(number), CFG, 5, epoch, content_key(picture(number))) for number in range(sum(SIZES))]
    return {views["global_crops"].numpy().tobytes() for views in made}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_no_example_is_lost_or_repeated_by_a_kill_at_any_place(tmp_path: Path, workers, world):
    files = FORMATS["parquet"](tmp_path / "set", SIZES)
    steps = 42 // world  # three epochs of 28 examples, 2 to a rank and step
    seen, finished = [], 99
    for rank in range(world):
        undisturbed = read_steps(stream_source(files, workers, world, rank, batch=2), steps)
        # at the beginning, in the middle and, for one process, at both sides of the edge of an epoch
        for stop in (1, 6, 13, 14, 15) if world == 1 else (1, 6):
            state = json.loads(json.dumps(undisturbed[stop - 1][1]))
            resumed = stream_source(files, workers, world, rank, batch=2)
            resumed.load_state_dict(state)
            assert read_steps(resumed, 4, start=stop) == undisturbed[stop : stop + 4]
        seen += [crops for step, _ in undisturbed for crops in step]
        finished = min(finished, *(place["epoch"] for place in undisturbed[-1][1]["places"]))
    assert len(seen) == len(set(seen)) == 84  # none twice in an epoch
    assert finished >= 1
    for epoch in range(finished):  # which every reader has left behind
        assert crops_in(epoch) <= set(seen)


def test_a_run_killed_again_and_again_reads_what_an_undisturbed_one_reads(tmp_path: Path):
    files = FORMATS["webdataset"](tmp_path / "set", SIZES)
    undisturbed = read_steps(stream_source(files, accumulation=2), 20)
    seen, state, lived = [], None, 0
    for steps in (1, 1, 4, 2, 7, 5):
        source = stream_source(files, accumulation=2)
        if state is not None:
            source.load_state_dict(json.loads(json.dumps(state)))
        read = read_steps(source, steps, lived)
        seen += [crops for crops, _ in read]
        state, lived = read[-1][1], lived + steps
    assert seen == [crops for crops, _ in undisturbed]


def test_what_loaders_read_ahead_is_not_counted_as_consumed(tmp_path: Path):
    files = FORMATS["parquet"](tmp_path / "set", SIZES)
    source = stream_source(files, workers=2, batch=2)
    batches = source.batches(0)
    next(batches)
    state = source.state_dict()
    assert [place["taken"] for place in state["places"]] == [2, 0] and state["turn"] == 1
    next(batches)
    assert state["places"][1]["taken"] == 0  # what was handed out before stays as it was


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_image_has_the_same_crops_wherever_and_in_whatever_format_it_is_read(tmp_path: Path, kind):
    files = FORMATS[kind](tmp_path / "set", SIZES)
    for world, rank in ((1, 0), (2, 1)):
        [batch] = next(stream_source(files, world=world, rank=rank).batches(0))
        for position, key in enumerate(batch.indices.tolist()):
            expected = make_views(picture(KEYS[key]), CFG, 5, 0, key)
            assert torch.equal(batch.global_crops[:, position], expected["global_crops"])


def test_the_next_epoch_has_another_order_and_other_crops(shards):
    source = stream_source(shards)
    batches = [batch for [batch] in islice(source.batches(0), 8)]
    first, second = ([key for batch in part for key in batch.indices.tolist()] for part in (batches[:4], batches[4:]))
    assert sorted(first) == sorted(second) and first != second
    assert len({crops for batch in batches for crops in crops_of(batch)}) == 24


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_and_named_alike_in_every_epoch_and_do_not_disturb_resuming(broken, workers):
    def read(steps, state=None):
        source = stream_source(broken, workers)
        if state is not None:
            source.load_state_dict(state)
        found = []
        for [batch] in islice(source.batches(0), steps):
            found.append((batch.indices.tolist(), batch.bad_indices, crops_of(batch), source.state_dict()))
        return found

    whole = read(8)
    assert all(len(keys) == 3 for keys, *_ in whole)
    bad = [name for _, names, *_ in whole for name in names]
    if workers == 0:  # two epochs, each with every row once, readable or not
        assert sorted(bad) == sorted(2 * ["3 of shard 0", "4 of shard 0", "11 of shard 0"])
        assert len({crop for _, _, crops, _ in whole for crop in crops}) == 24
    assert set(bad) == {"3 of shard 0", "4 of shard 0", "11 of shard 0"}
    for stop in range(1, 7) if workers == 0 else (3,):
        assert read(2, whole[stop - 1][-1]) == whole[stop : stop + 2]


def test_an_unreadable_image_ends_the_run_where_that_is_asked_for(broken):
    with pytest.raises(BadImageError, match=r"^image (3|4|11) of shard 0 cannot be read: .*--on_bad_image"):
        read_steps(stream_source(broken, on_bad_image="error"), 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_cannot_be_read_ends_the_run_in_one_line_that_names_it(tmp_path: Path, workers):
    files = FORMATS["webdataset"](tmp_path / "set", SIZES)
    source = stream_source(files, workers)
    broken = Path(files) / "train-2.tar"
    broken.write_bytes(broken.read_bytes()[:2600])
    with pytest.raises(TrainingError) as error:
        read_steps(source, 20)
    one_line_naming(error, "shard 2 of the stream")


def test_more_workers_than_shards_share_the_rows(parquet):
    source = stream_source(parquet, workers=2)
    [first, *_] = steps = [crops for crops, _ in read_steps(source, 4)]
    assert len(first) == 3 and len({crops for step in steps for crops in step}) == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workers": 1}, ("--dataloader_num_workers 1", "had 2")),
        ({"block": 8}, ("--resume_from_checkpoint", "another one", "'block_rows': 8")),
    ],
)
def test_a_stream_is_not_read_on_by_other_readers(shards, changes, words):
    state = stream_source(shards, workers=2).state_dict()
    with pytest.raises(OtherReadersError) as error:
        stream_source(shards, **{"workers": 2, **changes}).load_state_dict(state)
    one_line_naming(error, *words)


def test_another_data_set_is_refused_even_where_it_lies_in_as_many_shards(tmp_path: Path, shards):
    state = stream_source(shards).state_dict()
    other = stream_source(FORMATS["parquet"](tmp_path / "other", (3, 3, 3, 3)))
    differ = {key for key, value in other.layout.items() if state["layout"][key] != value}
    assert differ == {"first_row"}
    with pytest.raises(OtherReadersError) as error:
        other.load_state_dict(state)
    one_line_naming(error, "--resume_from_checkpoint", "another one", "resume with the data it was written with")


def test_other_pictures_of_the_same_names_are_refused(tmp_path: Path):
    sources = []
    for place, pixel in (("here", 0), ("there", 9)):
        (tmp_path / place).mkdir()
        for number in range(6):
            Image.new("RGB", (16, 16), (number, 0, pixel)).save(tmp_path / place / f"{number}.png")
        sources.append(stream_source(str(tmp_path / place)))
    with pytest.raises(OtherReadersError, match="another one"):
        sources[1].load_state_dict(sources[0].state_dict())


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_data_in_another_place_is_gone_on_with(tmp_path: Path, kind):
    here, there = (stream_source(FORMATS[kind](tmp_path / place, SIZES)) for place in ("here", "there"))
    read = read_steps(here, 2)
    there.load_state_dict(read[0][1])
    assert read_steps(there, 1) == read[1:]


def test_other_batches_go_on_with_the_example_that_comes_next(tmp_path: Path):
    files = FORMATS["parquet"](tmp_path / "set", SIZES)
    undisturbed = [crops for crops, _ in read_steps(stream_source(files, batch=1), 20)]
    _, (_, state) = read_steps(stream_source(files, batch=3), 2)
    smaller = stream_source(files, batch=2)
    smaller.load_state_dict(state)
    assert sum(undisturbed[6:14], []) == sum((crops for crops, _ in read_steps(smaller, 4)), [])


@pytest.mark.parametrize("before", [(1, 0), (1, 2), (2, 0)], ids=["alone", "two workers", "two processes"])
def test_other_readers_can_begin_the_next_epoch_and_leave_out_the_rest_of_this_one_only(tmp_path: Path, before):
    files, (world, workers) = FORMATS["parquet"](tmp_path / "set", SIZES), before
    sources = [stream_source(files, workers, world, rank, batch=2) for rank in range(world)]
    seen = [crops for source in sources for step, _ in read_steps(source, 3) for crops in step]
    assert len(seen) == 6 * world and set(seen) < crops_in(0)
    then = [stream_source(files, world=3, rank=rank, batch=1) for rank in range(3)]
    assert [source.begin_next_epoch([source.state_dict() for source in sources]) for source in then] == [1, 1, 1]
    after = []
    for source in then:  # shares differ in size
        steps = read_steps(source, sum(SIZES))
        after += [crops for [crops], state in steps if state["places"][0]["epoch"] == 1]
    assert len(after) == sum(SIZES) and set(after) == crops_in(1)


def test_streams_and_data_sets_do_not_take_each_others_places(parquet, shards):
    with pytest.raises(InputError) as error:
        stream_source(shards).load_state_dict({})
    one_line_naming(error, "no place in a stream", "--streaming")
    rows = MultiCropDataset(load_split(parquet, "train"), "image", CFG, seed=0)
    source = LoaderSource(rows, 12, CFG, CPU, 3)
    assert source.state_dict() == {}
    source.load_state_dict({})
    with pytest.raises(InputError, match="add --streaming"):
        source.load_state_dict(stream_source(shards).state_dict())


class TestKnnImagesOfAStream:
    def drawn(self, files: str, **options):
        args = make_arguments(dataset_name_or_path=files, streaming=True, **options)
        data = open_data(args)
        return data, [data.bank.image(row).tobytes() for row in data.bank.rows], data.bank.labels.tolist()

    def test_are_the_same_in_every_run_and_process(self, tmp_path):
        files = FORMATS["parquet"](tmp_path / "set", SIZES)
        options = {"knn_bank_samples": 20}
        (first, pictures, labels), (_, again, labels_again) = (self.drawn(files, **options) for _ in range(2))
        assert (pictures, labels) == (again, labels_again)
        assert len(pictures) == 18 and len(first.queries) == 2 and len(set(pictures)) == 18
        expected = [decode_image(picture(label)).numpy().tobytes() for label in labels]
        assert pictures == expected  # every image with its own label

    def test_of_an_archive_are_classified_by_its_cls_files(self, tmp_path):
        _, pictures, labels = self.drawn(FORMATS["webdataset"](tmp_path / "set", SIZES))
        assert pictures == [decode_image(picture(label)).numpy().tobytes() for label in labels]

    def test_come_from_the_first_rows_where_training_does(self, tmp_path):
        files = FORMATS["parquet"](tmp_path / "set", SIZES)
        data, _, labels = self.drawn(files, max_train_samples=10)
        assert sorted(labels + data.queries.labels.tolist()) == list(range(10))

    def test_of_another_stream_are_drawn_from_it(self, tmp_path):
        files = FORMATS["parquet"](tmp_path / "set", SIZES)
        other = FORMATS["parquet"](tmp_path / "other", (4, 5))
        args = make_arguments(
            dataset_name_or_path=files, streaming=True, eval_dataset_name_or_path=other, max_eval_samples=6,
        )  # fmt: skip
        data = open_data(args)
        assert len(data.bank) == 28 and len(data.queries) == 6 and "other" in data.evaluated_on
