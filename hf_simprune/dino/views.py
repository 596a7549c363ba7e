# SPDX-License-Identifier: Apache-2.0
"""The trainer's view source: a loader of uint8 crops, finished by photometric work on the device."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ..data.streams import START, Place
from ..errors import InputError
from .augmentation import AugmentationConfig
from .batch import Batch, collate
from .engine import Views
from .interrupts import outlive_interrupts
from .photometric import apply_photometric
from .sampler import GlobalBatchSampler
from .streaming import StreamingMultiCropDataset, collate_with_place
from .trainer_state import is_count
from .view_source import OtherReadersError


T = TypeVar("T")


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

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the order is a function of the step."""
        return {}

    def begin_next_epoch(self, states: Sequence[dict[str, Any]]) -> int:
        """Never needed: any number of processes and workers can go on where they are."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises InputError when there is a state, as it is a stream's."""
        if state:
            raise InputError(
                "--resume_from_checkpoint: the checkpoint was written while reading a stream; add --streaming"
            )

    def views(self, batch: Batch) -> Views:
        return finished_views(batch, self.config, self.device)


class StreamSource:
    """Micro-batches of a stream; each process reads its own share, see `StreamingMultiCropDataset`.

    Args:
        open_stream: builds this process's examples from the places of its readers and the one whose turn it is.
        layout: of the stream, as `ShuffledStream` tells it.
    """

    def __init__(
        self,
        open_stream: Callable[[Sequence[Place], int], StreamingMultiCropDataset],
        layout: dict[str, int | str],
        config: AugmentationConfig,
        device: torch.device,
        per_device_batch: int,
        accumulation: int = 1,
        num_workers: int = 0,
    ) -> None:
        self.open_stream = open_stream
        self.layout = layout
        self.config = config
        self.device = device
        self.per_device_batch = per_device_batch
        self.accumulation = accumulation
        self.num_workers = num_workers
        self._places: list[Place] = [START] * max(1, num_workers)
        self._turn = 0

    def state_dict(self) -> dict[str, Any]:
        """Places of the readers after the micro-batches handed out, and what these depend on."""
        return {
            "workers": len(self._places),
            "layout": self.layout,
            "turn": self._turn,
            "places": list(self._places),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            OtherReadersError: it is of another stream, or of readers that shared it differently.
            InputError: it is not a stream's.
        """
        if not state:
            raise InputError(
                "--resume_from_checkpoint: the checkpoint holds no place in a stream, so this cannot be the run that "
                "wrote it; resume without --streaming, or with the version that it was written with"
            )
        places, turn = state.get("places", []), state.get("turn")
        if state.get("workers") != len(self._places) or len(places) != len(self._places):
            raise OtherReadersError(
                f"--dataloader_num_workers {self.num_workers}: the checkpoint's run had {state.get('workers')}, which "
                "each read a share of the stream; use as many"
            )
        if state.get("layout") != self.layout:
            raise OtherReadersError(
                "--resume_from_checkpoint: the stream is another one than the checkpoint's "
                f"({state.get('layout')} then, {self.layout} now); resume with the data it was written with"
            )
        if not is_count(turn) or turn >= len(places):
            raise InputError(f"--resume_from_checkpoint: the checkpoint names no reader that could be {turn}")
        self._places, self._turn = list(places), turn

    def begin_next_epoch(self, states: Sequence[dict[str, Any]]) -> int:
        """As if all that is left of the epoch that `states` are in had been read."""
        epoch = 1 + max(place["epoch"] for state in states for place in state.get("places", [START]))
        self._places, self._turn = [START | {"epoch": epoch} for _ in self._places], 0
        return epoch

    def batches(self, start: int) -> Iterator[list[Batch]]:
        """From the loaded state on, or from the beginning, without end; `start` says no more than that."""
        dataset = self.open_stream(self._places, self._turn)
        options = loader_options(self.num_workers, self.device) | {"collate_fn": collate_with_place}
        loader = DataLoader(dataset, batch_size=self.per_device_batch, **options)
        for group in grouped(iter(loader), self.accumulation):
            for _, place in group:  # a loader takes from its workers in turn
                self._places[self._turn] = place
                self._turn = (self._turn + 1) % len(self._places)
            yield [batch for batch, _ in group]

    def views(self, batch: Batch) -> Views:
        return finished_views(batch, self.config, self.device)


def loader_options(num_workers: int, device: torch.device) -> dict:
    """What every loader of crops has in common."""
    options = {"collate_fn": collate, "num_workers": num_workers, "pin_memory": device.type == "cuda"}
    if num_workers:
        options |= {"worker_init_fn": outlive_interrupts, "prefetch_factor": 4}
    return options


def grouped(batches: Iterator[T], size: int) -> Iterator[list[T]]:
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
    return Views(global_crops, local_crops, batch.bad_indices, masks, batch.draws)
