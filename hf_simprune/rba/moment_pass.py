# SPDX-License-Identifier: Apache-2.0
"""One pass over the fit images that fills an accumulator, shared among processes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .activations import Activations
from .calibration import Chunk
from .measure import Bench
from .moments import MomentAccumulator, Moments


@torch.no_grad()
def fit_moments(
    bench: Bench,
    accumulator: MomentAccumulator,
    activations_of: Callable[[Tensor], Activations],
    label: str,
    watch: Callable[[Sequence[int], Activations], None] | None = None,
) -> Moments:
    """Moments of what `activations_of` gives for the pixels of the fit images, the same on all processes.

    `watch` sees the row numbers and activations of every chunk of this process.

    Raises:
        InputError: more than half of the images cannot be read, or activations are not finite.
    """
    images, (rank, world) = bench.images, bench.ranks
    # the main process's first chunk is everyone's pilot, so that all centre about the same point
    piloted = False
    for chunk in images.chunks(images.fit, bench.chunk_size, rank, world, None if bench.quiet else label):
        pixel_values, indices = _by_parity(chunk)
        found = activations_of(pixel_values.to(bench.adapter.model.device))
        if not piloted:
            accumulator.set_pilot(found if rank == 0 else None, bench.accelerator)
            piloted = True
        accumulator.update(found, torch.tensor([index % 2 for index in indices]))
        if watch is not None:
            watch(indices, found)
    if not piloted:
        accumulator.set_pilot(None, bench.accelerator)
    accumulator.reduce(bench.accelerator)
    images.reader.check_readable(images.fit, bench.accelerator)
    return accumulator.finish()


def sum_device(bench: Bench) -> torch.device:
    """Where fp64 sums are kept: beside the network, but for Apple's GPUs, which have no fp64."""
    device = bench.adapter.model.device
    return torch.device("cpu") if device.type == "mps" else device


def _by_parity(chunk: Chunk) -> tuple[Tensor, list[int]]:
    """The chunk's images, those of even rows first, as the accumulator is fastest with."""
    order = sorted(range(len(chunk.indices)), key=lambda place: chunk.indices[place] % 2)
    return chunk.pixel_values[order], [chunk.indices[place] for place in order]
