# SPDX-License-Identifier: Apache-2.0
"""What every card and run record tells: the machine, the libraries, the command, the licence."""

import os
import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HTTPError

from .. import __version__
from .hub_names import hub_names, is_hub_id, is_repo_id
from .privacy import masked, short_word


__all__ = [
    "Licence",
    "base_model_of",
    "hardware",
    "is_hub_id",
    "launch_words",
    "licence_of",
    "shown_command",
    "versions",
]
_PACKAGE, _PROGRAM = "hf_simprune", "hf-simprune"
# Programs whose words are not those of the run.
_CONSOLES = ("ipykernel_launcher", "colab_kernel_launcher", "ipython", "ipython3", "jupyter")
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
    data = _card_of(name_or_path, revision, token)
    found = data.get("license")
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, str) or found == "unknown":
        return None
    if found not in hub_names("licenses"):
        return Licence("other", found, data.get("license_link"))
    if found == "other" and not data.get("license_name"):
        return None
    return Licence(found, data.get("license_name"), data.get("license_link"))


def base_model_of(folder: str) -> str | None:
    """The Hub id that the card in a folder names as what its model was made from, None where it names none or many."""
    found = _card_of(folder).get("base_model")
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    return found if is_repo_id(found) else None


def _card_of(name_or_path: str, revision: str | None = None, token: str | None = None) -> dict[str, Any]:
    """The metadata of a model's card, {} where it cannot be had."""
    try:
        folder = Path(name_or_path).expanduser()
        local = folder / "README.md"
        if not folder.is_dir():
            local = Path(hf_hub_download(name_or_path, "README.md", revision=revision, token=token))
        return ModelCard(local.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (HTTPError, OSError, ValueError, yaml.YAMLError):
        return {}


def launch_words(argv: Sequence[str], command: str, args: Any, processes: int = 1) -> list[str]:
    """What starts a run again, word by word, without the folders of this machine.

    That is `hf-simprune`, or a script by python, a recipe by its path in the repository; on several processes by
    accelerate. A run that was started in a notebook or by hand in Python has no command; its options make one.

    Args:
        argv: as `sys.argv`.
        command: of `hf-simprune` that does the same, such as "train".
        args: the run's options, a dataclass.
        processes: of the run.
    """
    script, words = Path(argv[0] if argv else ""), list(argv[1:])
    root = None
    launcher = ["python"] if processes == 1 else ["accelerate", "launch", "--num_processes", str(processes)]
    if not script.name or script.name == "-c" or script.stem in _CONSOLES:
        script, words = Path(_PROGRAM), [command, *_option_words(args)]
    if script.stem == _PROGRAM or script.parts[-2:] == (_PACKAGE, "cli.py"):
        launcher = [_PROGRAM] if processes == 1 else [*launcher, "-m", f"{_PACKAGE}.cli"]
    else:
        folder = Path(os.path.abspath(script)).parent
        root = folder.parent if folder.name == "recipes" else None
        launcher.append(short_word(str(script)) if root is None else f"recipes/{script.name}")
    return [*launcher, *(short_word(word, root) for word in words)]


def shown_command(words: Sequence[str]) -> str:
    """For a shell, without access tokens."""
    return masked(" ".join(map(shlex.quote, words)))


def _option_words(args: Any) -> list[str]:
    """Options that differ from their defaults, as they are typed."""
    words: list[str] = []
    for entry in fields(args):
        value = getattr(args, entry.name)
        if entry.name == "token" or value is None or value == _default(entry):
            continue
        several = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{entry.name}", *(str(each).lower() if isinstance(each, bool) else str(each) for each in several)]
    return words


def _default(entry: Field) -> Any:
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default


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
