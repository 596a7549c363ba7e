# SPDX-License-Identifier: Apache-2.0
"""The trainer's view source: a loader of uint8 crops, finished by photometric work on the device."""

import signal
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from .augmentation import AugmentationConfig
from .batch import Batch, collate
from .engine import Views
from .photometric import apply_photometric
from .sampler import GlobalBatchSampler
from .streaming import StreamingMultiCropDataset


def outlive_interrupts(worker: int) -> None:
    """Ctrl-C, and a scheduler's SIGTERM, reach the whole process group; the training process decides, and its workers
    go on until it stops them. A second SIGTERM ends a worker, as that is how a stuck one is stopped."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class LoaderSource:
    """Micro-batches of a map-style data set of examples as `crops.make_views` gives them.

    Args:
        dataset: indexed by (epoch, index).
        num_examples: in the data set.
        config: of the augmentation.
        device: where photometric work is done.
    """

    def __init__(
        self,
        dataset: Dataset,
        num_examples: int,
        config: AugmentationConfig,
        device: torch.device,
        per_device_batch: int,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        self.dataset = dataset
        self.num_examples = num_examples
        self.config = config
        self.device = device
        self.per_device_batch = per_device_batch
        self.accumulation = accumulation
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self.num_workers = num_workers

    def batches(self, start: int) -> Iterator[list[Batch]]:
        """From optimiser step `start` on, without end."""
        sampler = GlobalBatchSampler(
            self.num_examples,
            self.per_device_batch,
            None,
            self.world_size,
            self.rank,
            self.accumulation,
            self.seed,
            start_step=start,
        )
        loader = DataLoader(self.dataset, batch_sampler=sampler, **loader_options(self.num_workers, self.device))
        yield from grouped(iter(loader), self.accumulation)

    def views(self, batch: Batch) -> Views:
        return finished_views(batch, self.config, self.device)


class StreamSource:
    """Micro-batches of a stream; each process reads its own share, see `StreamingMultiCropDataset`.

    Args:
        open_stream: builds the stream's examples from the first batch wanted of this process.
    """

    def __init__(
        self,
        open_stream: Callable[[int], StreamingMultiCropDataset],
        config: AugmentationConfig,
        device: torch.device,
        per_device_batch: int,
        accumulation: int = 1,
        num_workers: int = 0,
    ) -> None:
        self.open_stream = open_stream
        self.config = config
        self.device = device
        self.per_device_batch = per_device_batch
        self.accumulation = accumulation
        self.num_workers = num_workers

    def batches(self, start: int) -> Iterator[list[Batch]]:
        """From optimiser step `start` on, without end."""
        dataset = self.open_stream(start * self.accumulation)
        options = loader_options(self.num_workers, self.device)
        loader = DataLoader(dataset, batch_size=self.per_device_batch, **options)
        yield from grouped(dataset.resumed(iter(loader)), self.accumulation)

    def views(self, batch: Batch) -> Views:
        return finished_views(batch, self.config, self.device)


def loader_options(num_workers: int, device: torch.device) -> dict:
    """What every loader of crops has in common."""
    options = {"collate_fn": collate, "num_workers": num_workers, "pin_memory": device.type == "cuda"}
    if num_workers:
        options |= {"worker_init_fn": outlive_interrupts, "prefetch_factor": 4}
    return options


def grouped(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` consecutive micro-batches; an incomplete last list is left out."""
    while True:
        group = []
        for _ in range(size):
            batch = next(batches, None)
            if batch is None:
                return
            group.append(batch)
        yield group


def finished_views(batch: Batch, config: AugmentationConfig, device: torch.device) -> Views:
    """Normalised crops, and masks if there are any, on the device."""
    batch = batch.to(device, non_blocking=True)
    global_crops, local_crops = apply_photometric(batch, config, device)
    masks = None if batch.masks is None else batch.masks.flatten(0, 1)
    return Views(global_crops, local_crops, batch.bad_indices, masks)
