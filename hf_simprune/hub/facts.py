# SPDX-License-Identifier: Apache-2.0
"""What every card and run record tells: the machine, the libraries, the command, and what is on the Hub."""

import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from .. import __version__


_LIBRARIES = ("torch", "transformers", "accelerate", "datasets")


def versions() -> dict[str, str]:
    """Of this package and the libraries it stands on."""
    return {"hf-simprune": __version__} | {name: version(name) for name in _LIBRARIES}


def hardware() -> str:
    """Such as "1 × NVIDIA H200" or "2 CPU cores (x86_64)"."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def is_hub_id(name: str | None) -> bool:
    """Whether `name` is a Hub repository rather than something on this disk."""
    return name is not None and not Path(name).exists() and name.count("/") <= 1


def launch_command(argv: Sequence[str], processes: int = 1) -> str:
    """What was typed, for a shell: `argv` as in `sys.argv`, run by python or, on several processes, by accelerate."""
    launcher = ["python"] if processes == 1 else ["accelerate", "launch", "--num_processes", str(processes)]
    return " ".join(map(shlex.quote, [*launcher, *argv]))
