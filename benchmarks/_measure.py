# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks here measure: interleaved sides, ratios with bootstrap intervals, memory in fresh processes."""

import functools
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from hf_simprune.evaluation.latency import cpu_seconds as seconds
from hf_simprune.evaluation.latency import interleave as _interleave
from hf_simprune.evaluation.latency import median_ratio as median_ratio


# CPU seconds here too: wall seconds grow whenever another program takes the processor away.
interleave = functools.partial(_interleave, clock=seconds)
_SECONDS = "seconds "


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


class Apart:
    """One side of a race in a fresh process, with memory and threads to itself: this benchmark run again with
    `--serve SIDE` added, which ends in `serve`."""

    def __init__(self, side: str) -> None:
        command = [sys.executable, "-W", "ignore", *sys.argv, "--serve", side]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self) -> float:
        """Let it make a step; its seconds."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(_SECONDS):
                return float(line.removeprefix(_SECONDS))
        raise SystemExit(f"error: {' '.join(map(str, self.process.args))} ended with {self.process.wait()}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(step: Callable[[], object], device: torch.device) -> None:
    """Make a step and tell its seconds whenever `Apart` asks for one."""
    for _ in sys.stdin:
        print(f"{_SECONDS}{seconds(step, device)}", flush=True)


def interleave_apart(sides: Sequence[str], rounds: int, device: torch.device, warmup: int) -> dict[str, list[float]]:
    """As `interleave`, every side in a process of its own."""
    apart = {side: Apart(side) for side in sides}
    try:
        return _interleave(apart, rounds, device, warmup, clock=lambda step, _: step())
    finally:
        for side in apart.values():
            side.close()


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
