# SPDX-License-Identifier: Apache-2.0
"""Cards and records as others read them: the card loads the repository, and no folder of this machine is named."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from .model_card import addressed_to
from .privacy import home_in, short_card, short_record


_CARD = "README.md"
# They hold every path in full where they are written, for going on from there and for trying again.
_RECORDS = ("compression.json", "redundancy.json", "training/run.json", "training/arguments.yaml")
TEXT_FILES = (".json", ".jsonl", ".yaml", ".md", ".py", ".cff", ".txt")


def shared_form(name: str, path: Path, load_from: str) -> Path | bytes:
    """A file of a model's folder as it is published: the path where it goes as it is, else its bytes.

    Args:
        name: of the file in the repository, with `/`.
        path: where it lies.
        load_from: what the card's code gives to `from_pretrained`, the repository.
    """
    if name != _CARD and name not in _RECORDS:
        return path
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return path
    if name == _CARD:
        short = short_card(addressed_to(text, load_from, _written_by_a_run(path.parent)))
    else:
        short = short_record(name, text)
    return path if short == text else short.encode()


def home_warnings(folder: Path, names: Iterable[str]) -> list[str]:
    """One line for each of the files that names a home folder even in the form that is published."""
    found = []
    for name in sorted(names):
        if name.endswith(TEXT_FILES):
            shared = shared_form(name, folder / name, "user/name")
            raw = shared if isinstance(shared, bytes) else shared.read_bytes()
            home = home_in(raw.decode("utf-8", errors="replace"))
            if home is not None:
                found.append(f"{name} names a folder of this machine, {home}: others will read it")
    return found


def _written_by_a_run(folder: Path) -> Callable[[str], bool]:
    """Whether a name is the folder's, or what a run with the options that lie there wrote into its card."""
    names, pushed = {folder.resolve().name, str(folder)}, set()
    for options in (_read(folder / "compression.json").get("options"), _read(folder / "training" / "arguments.yaml")):
        if isinstance(options, dict):
            output, repository = str(options.get("output_dir", "")), options.get("hub_model_id")
            names |= {output, str(repository)}
            if options.get("push_to_hub"):
                pushed.add(Path(str(repository or output)).name)
    return lambda name: name in names or name.split("/")[-1] in pushed


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
