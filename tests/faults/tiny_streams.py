"""A trainer of ten steps on a stream of 28 pictures, for one process or several."""

from pathlib import Path

import torch
from accelerate import Accelerator

from hf_simprune.data.loading import load_split
from hf_simprune.data.streams import ShuffledStream
from hf_simprune.dino.augmentation import AugmentationConfig
from hf_simprune.dino.streaming import StreamingMultiCropDataset, content_key
from hf_simprune.dino.trainer import DinoTrainer, LoopSettings
from hf_simprune.dino.views import StreamSource

from ..data.stream_files import picture
from ..dino.conftest import tiny_dual, tiny_engine, tiny_schedules


SIZES = (7, 7, 7, 7)  # two shards for each of two processes; seven steps of 4 are an epoch
KEYS = sorted(content_key(picture(number)) for number in range(sum(SIZES)))
STEPS, GLOBAL_BATCH = 10, 4


class Recorded(StreamSource):
    """Remembers what was read; loses its data before a step, and meets an unreadable image in another."""

    def __init__(self, *arguments, lost_at=None, bad_at=None) -> None:
        super().__init__(*arguments)
        self.lost_at, self.bad_at, self.ids = lost_at, bad_at, []

    def batches(self, start):
        for number, group in enumerate(super().batches(start), start + 1):
            if number == self.lost_at:
                raise OSError(5, "the share is gone")
            yield group

    def views(self, batch):
        self.ids += batch.indices.tolist()
        bad = len(self.ids) == self.bad_at
        return super().views(batch)._replace(bad_indices=("3 of shard 1",) if bad else ())


def streamed(
    folder: Path, files: str, weights: int = 0, allowed: bool = False, total: int = STEPS, **faults
) -> DinoTrainer:
    """A trainer for this process; a tenth of a second long."""
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=True)
    world, rank = accelerator.num_processes, accelerator.process_index
    rows = ShuffledStream(load_split(files, "train", streaming=True), ["image"], 5, world, block_rows=4, open_shards=2)
    config = AugmentationConfig(global_crop_size=16, local_crop_size=8, local_crops_number=2)

    def opened(places, first):
        return StreamingMultiCropDataset(rows, "image", config, 5, "skip", rank, places, first)

    source = Recorded(opened, rows.layout, config, accelerator.device, GLOBAL_BATCH // world, **faults)
    settings = LoopSettings(
        folder, GLOBAL_BATCH, logging_steps=4, save_steps=4, save_total_limit=None, disable_tqdm=True,
        allow_schedule_change=allowed,
    )  # fmt: skip
    engine = tiny_engine(tiny_dual("random", 0.6, dtype=torch.float32, seed=weights))
    return DinoTrainer(engine, tiny_schedules(total), source, settings)
