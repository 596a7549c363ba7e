"""Streams: every example once an epoch wherever it is read, and exact resumption."""

import numpy as np
import pytest
from torch.utils.data import DataLoader

from hf_simprune.data.loading import load_split
from hf_simprune.dino.batch import collate
from hf_simprune.dino.data import BadImageError
from hf_simprune.dino.streaming import StreamingMultiCropDataset
from hf_simprune.errors import InputError

from .image_files import CFG


def stream_batches(
    folder: str, count: int, workers: int = 0, start: int = 0, world: int = 1, rank: int = 0, **changes
):
    stream = load_split(folder, "train", streaming=True)
    dataset = StreamingMultiCropDataset(
        stream, "image", CFG, 0, 3, world_size=world, rank=rank, num_workers=workers, start_batch=start,
        shuffle_buffer=4, **changes,
    )  # fmt: skip
    loader = DataLoader(dataset, batch_size=3, collate_fn=collate, num_workers=workers)
    return [batch for batch, _ in zip(dataset.resumed(loader), range(count))]


def fingerprints(batches) -> list[int]:
    """Names each example by its crops and factors, which only its bytes and the epoch decide."""
    return [
        hash((batch.global_crops[:, i].numpy().tobytes(), batch.parameters.factors[:, i].tobytes()))
        for batch in batches
        for i in range(len(batch))
    ]


@pytest.mark.parametrize(("workers", "world"), [(2, 1), (1, 2), (0, 3)])
def test_a_stream_gives_each_image_once_an_epoch_with_the_same_crops_everywhere(shards, workers, world):
    alone = fingerprints(stream_batches(shards, 4))
    assert len(set(alone)) == 12
    per_rank = 4 if world == 1 else 1 if world == 3 else 2
    shared = [
        name
        for rank in range(world)
        for name in fingerprints(stream_batches(shards, per_rank, workers, 0, world, rank))
    ]
    if world == 3:  # 12 rows, every third to each rank: 4 rows, of which the first batch has 3
        assert len(set(shared)) == 9 and set(shared) <= set(alone)
    else:
        assert sorted(shared) == sorted(alone)


def test_a_streams_next_epoch_has_another_order_and_other_crops(shards):
    first, second = (fingerprints(part) for part in np.array_split(np.array(stream_batches(shards, 8), object), 2))
    assert len(set(second)) == 12 and not set(first) & set(second)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_where_it_stopped(shards, workers):
    full = fingerprints(stream_batches(shards, 9, workers))
    assert fingerprints(stream_batches(shards, 4, workers, start=5)) == full[15:27]


def test_a_streams_unreadable_images_are_replaced_and_do_not_disturb_resuming(broken):
    batches = stream_batches(broken, 8)
    assert all(len(batch) == 3 for batch in batches)
    bad = [index for batch in batches for index in batch.bad_indices]
    assert len(bad) == 6 and len([index for index in bad if index < 12]) == 3
    assert [index for batch in batches for index in batch.indices.tolist()] == list(range(24))
    for start in range(1, 5):
        assert fingerprints(stream_batches(broken, 2, start=start)) == fingerprints(batches[start : start + 2])
    with pytest.raises(BadImageError, match="--on_bad_image"):
        stream_batches(broken, 8, on_bad_image="error")


def test_more_workers_than_shards_are_refused(parquet):
    with pytest.raises(InputError, match="--dataloader_num_workers 2: .* 1 shard"):
        stream_batches(parquet, 1, workers=2)
