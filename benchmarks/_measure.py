# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks here measure: interleaved sides, ratios with bootstrap intervals, memory in fresh processes."""

import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch


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


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """What one call costs: seconds on the GPU by CUDA events, else CPU seconds summed over all threads.

    CPU seconds do not grow when other programs take the processor away, wall seconds do.
    """
    if device.type != "cuda":
        start = time.process_time()
        call()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def interleave(
    sides: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every side in every round, A B C A B C …, so that drift hits all sides alike."""
    for _ in range(warmup):
        for call in sides.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            times[name].append(seconds(call, device))
    return times


def peak_bytes(device: torch.device) -> int:
    """Highest memory of this process so far: resident on CPU (Linux), allocated by tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # not getrusage: its peak is inherited from the process that started this one
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def peak_bytes_apart(side: str) -> int:
    """Run this benchmark again in a fresh process, with `--peak_of SIDE` added, and read the peak it prints last."""
    command = [sys.executable, "-W", "ignore", *sys.argv, "--peak_of", side]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(finished.stdout.strip().splitlines()[-1])


def processor_name() -> str:
    """The CPU's name where the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    except OSError:
        names = set()
    return " / ".join(sorted(names)) or platform.machine()


def header(device: torch.device, seed: int) -> dict[str, object]:
    """The circumstances of a measurement."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "command": " ".join(["python", *sys.argv]),
        "processor": f"{processor_name()}, {torch.get_num_threads()} threads",
        **({"gpu": gpu} if gpu else {}),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")},
        },
        "seed": seed,
        "date": time.strftime("%Y-%m-%d"),
    }


def describe(times: Mapping[str, Sequence[float]], images: int) -> dict[str, dict[str, float]]:
    """Median and least seconds a step, and images a second at the median."""
    return {
        name: {
            "median_s": round(statistics.median(values), 4),
            "least_s": round(min(values), 4),
            "images_per_s": round(images / statistics.median(values), 2),
        }
        for name, values in times.items()
    }


def emit(report: Mapping[str, object], path: str | None) -> None:
    """Write the report as JSON to `path`, if one was given."""
    if path is not None:
        with open(path, "w") as file:
            json.dump(report, file, indent=1)
