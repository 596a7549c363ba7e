# SPDX-License-Identifier: Apache-2.0
"""Time of several calls measured in turns, and ratios of it with bootstrap intervals.

Calls take turns (A B C A B C …), so that a slow minute of the machine slows all of them alike and leaves their ratio.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from ..errors import InputError


Name = TypeVar("Name", bound=Hashable)
Clock = Callable[[Callable[[], object], torch.device], float]


class Ratio(NamedTuple):
    """Median of paired ratios with the bounds of its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def median_ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Ratio:
    """Median of numerator/denominator over the rounds; the rounds are what the bootstrap draws again, 10,000 times."""
    ratios = np.asarray(numerators) / np.asarray(denominators)
    rounds = np.random.default_rng(seed).integers(len(ratios), size=(10_000, len(ratios)))
    low, high = np.percentile(np.median(ratios[rounds], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def wall_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a user waits for one call: wall time on the CPU, CUDA events on the GPU."""
    if device.type == "cuda":
        return _event_seconds(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cpu_seconds(call: Callable[[], object], device: torch.device) -> float:
    """What one call costs: CPU seconds summed over all threads, or seconds between CUDA events on the GPU.

    CPU seconds do not grow when other programs take the processor away, wall seconds do.
    """
    if device.type == "cuda":
        return _event_seconds(call)
    start = time.process_time()
    call()
    return time.process_time() - start


def interleave(
    sides: Mapping[Name, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warmup: int = 1,
    clock: Clock = wall_seconds,
) -> dict[Name, list[float]]:
    """Seconds of every side in every round, all sides once a round in the order given.

    Args:
        sides: what to call, by name.
        rounds: how often, after `warmup` rounds that are not counted.
        device: where the calls compute.
        clock: [`wall_seconds`] or [`cpu_seconds`].
    """
    if rounds < 1:
        raise InputError(f"rounds={rounds}: at least 1 round must be timed")
    for _ in range(warmup):
        for call in sides.values():
            call()
    times: dict[Name, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            times[name].append(clock(call, device))
    return times


class LatencyComparison(NamedTuple):
    """Median wall seconds of a call on both networks, and their ratio (compressed / original)."""

    original: float
    compressed: float
    ratio: Ratio


@torch.inference_mode()
def compare_latency(
    original: Callable[[torch.Tensor], object],
    compressed: Callable[[torch.Tensor], object],
    pixel_values: torch.Tensor,
    rounds: int = 30,
    warmup: int = 3,
    clock: Clock = wall_seconds,
) -> LatencyComparison:
    """Time both networks on the same pixels in turns, without gradients.

    Args:
        original: model or any function of `pixel_values`, and likewise `compressed`.
        pixel_values: (B, C, H, W) on the networks' device and in their dtype.
    """
    sides = {"original": lambda: original(pixel_values), "compressed": lambda: compressed(pixel_values)}
    times = interleave(sides, rounds, pixel_values.device, warmup, clock)
    ratio = median_ratio(times["compressed"], times["original"])
    return LatencyComparison(statistics.median(times["original"]), statistics.median(times["compressed"]), ratio)


def _event_seconds(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000
