# SPDX-License-Identifier: Apache-2.0
"""What every card and run record tells: the machine, the libraries, the command, the licence."""

import os
import platform
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HTTPError

from .. import __version__
from .hub_names import hub_names, is_hub_id


__all__ = ["Licence", "hardware", "is_hub_id", "launch_command", "licence_of", "versions"]
_LIBRARIES = ("torch", "transformers", "accelerate", "datasets")


class Licence(NamedTuple):
    """A Hub identifier; `other` has a name and may have a link."""

    identifier: str
    name: str | None = None
    link: str | None = None


def versions() -> dict[str, str]:
    """Of this package and the libraries it stands on."""
    return {"hf-simprune": __version__} | {name: version(name) for name in _LIBRARIES}


def hardware() -> str:
    """Such as "1 × NVIDIA H200" or "2 cores of an AMD EPYC (x86_64)"."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    name = _processor_name()
    cores = f"{os.cpu_count()} CPU cores" if name is None else f"{os.cpu_count()} cores of {name}"
    return f"{cores} ({platform.machine()})"


def licence_of(name_or_path: str, revision: str | None = None, token: str | None = None) -> Licence | None:
    """The licence that a model's card names, None where there is no card or none in it, or the Hub is out of reach."""
    try:
        folder = Path(name_or_path).expanduser()
        local = folder / "README.md"
        if not folder.is_dir():
            local = Path(hf_hub_download(name_or_path, "README.md", revision=revision, token=token))
        data = ModelCard(local.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (HTTPError, OSError, ValueError, yaml.YAMLError):
        return None
    found = data.get("license")
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, str):
        return None
    if found not in hub_names("licenses"):
        return Licence("other", found, data.get("license_link"))
    if found == "other" and not data.get("license_name"):
        return None
    return Licence(found, data.get("license_name"), data.get("license_link"))


def launch_command(argv: Sequence[str], processes: int = 1) -> str:
    """What was typed, for a shell: `argv` as in `sys.argv`, run by python or, on several processes, by accelerate."""
    launcher = ["python"] if processes == 1 else ["accelerate", "launch", "--num_processes", str(processes)]
    return " ".join(map(shlex.quote, [*launcher, *argv]))


def _processor_name() -> str | None:
    """What the processor calls itself, with an article and without trade marks; None where the system does not say."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        name = found[1] if found else ""
    except OSError:
        name = platform.processor()
    name = " ".join(re.sub(r"\((R|TM|r|tm)\)|\bCPU\b|@.*", "", name).split())
    if not name or name == platform.machine():
        return None
    return f"an {name}" if name[0] in "AEIOaeio" else f"a {name}"
