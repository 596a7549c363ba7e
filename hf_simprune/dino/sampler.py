# SPDX-License-Identifier: Apache-2.0
"""Which examples make up which step: a function of (seed, epoch, step), whatever the number of processes."""

from collections.abc import Iterator
from itertools import count

from torch.utils.data import Sampler

from ..errors import InputError
from .augmentation import epoch_order


def steps_per_epoch(num_examples: int, per_device_batch: int, world_size: int, accumulation: int) -> int:
    """floor(N / global batch); raises InputError when the global batch is larger than the data set."""
    global_batch = per_device_batch * world_size * accumulation
    if global_batch > num_examples:
        raise InputError(
            f"--per_device_train_batch_size {per_device_batch} (x {world_size} processes x {accumulation} accumulated "
            f"batches = {global_batch} images a step) is larger than the training set of {num_examples} images"
        )
    return num_examples // global_batch


class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of one rank as lists of (epoch, index), from step `start_step` to `total_steps` (None: endless).

    Step t of an epoch takes the images t·G to (t+1)·G of the epoch's order, G = per_device_batch · world_size ·
    accumulation; micro-batch a of rank r is piece a·world_size + r of them. So 1 × 32 and 4 × 8 see the same images
    at the same step, and a resumed run goes on where it stopped. It runs on through all epochs, which keeps a
    DataLoader's workers alive. Raises InputError when a step needs more images than there are.
    """

    def __init__(
        self,
        num_examples: int,
        per_device_batch: int,
        total_steps: int | None = None,
        world_size: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        seed: int = 0,
        start_step: int = 0,
    ):
        self.steps_per_epoch = steps_per_epoch(num_examples, per_device_batch, world_size, accumulation)
        self.num_examples = num_examples
        self.per_device_batch = per_device_batch
        self.total_steps = total_steps
        self.world_size = world_size
        self.rank = rank
        self.accumulation = accumulation
        self.seed = seed
        self.start_step = start_step

    def __len__(self) -> int:
        """Micro-batches that are left."""
        if self.total_steps is None:
            raise TypeError("an endless sampler has no length")
        return max(0, self.total_steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size, pieces = self.per_device_batch, self.world_size * self.accumulation
        order, order_epoch = None, -1
        steps = count(self.start_step) if self.total_steps is None else range(self.start_step, self.total_steps)
        for step in steps:
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self.seed, epoch, self.num_examples), epoch
            assert order is not None
            for piece in range(self.rank, pieces, self.world_size):
                start = (step_of_epoch * pieces + piece) * size
                yield [(epoch, index) for index in order[start : start + size].tolist()]
