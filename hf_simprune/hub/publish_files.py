# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are published: those a model is loaded, understood and reproduced with, and no others."""

import ast
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import InputError
from .privacy import TOKEN
from .shared_files import TEXT_FILES, home_warnings


CONFIG, CARD = "config.json", "README.md"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What may go beside weights and code. Everything else stays: checkpoints, logs, optimiser states, hidden files, and
# `training/*.safetensors`, of which some hold images of the data set.
_PUBLISHED = re.compile(
    r"config\.json|generation_config\.json|(pre)?processor_config\.json|README\.md|[^/.][^/]*\.png|metrics\.jsonl|"
    r"compression\.json|redundancy\.json|training/(run\.json|arguments\.yaml)|\.eval_results/[^/.][^/]*\.yaml|"
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|vocab\.txt|merges\.txt|spiece\.model|"
    r"(LICENSE|NOTICE)(\.\w+)?|CITATION\.cff"
)
# What an earlier version of the same model may have left in the repository and would be mixed with the new one:
# weights that are loaded in place of the new ones, code that nothing uses, a processor for other images, numbers and
# pictures of another network. Scores are those of the names that `write_benchmark_entries` gives.
_STALE = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|\w+_simprune_\w+\.py|compression\.json|"
    r"redundancy\.(json|png)|(pre)?processor_config\.json|metrics\.jsonl|training/(run\.json|arguments\.yaml)|"
    r"(loss_curve|pruned_tokens|tokens_by_depth)\.png|\.eval_results/[\w.-]+--[\w.-]+\.yaml"
)


@dataclass(frozen=True)
class Content:
    """What goes to the Hub of a folder.

    Attributes:
        files: by their path in the repository.
        model_type: of the configuration.
        left_out: what stays on this machine, sub-folders with a slash at the end; of a sub-folder that is published in
            part, what it holds by name.
        warnings: what is missing, and what is wrong with the card.
    """

    files: dict[str, Path]
    model_type: str
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]


def read_folder(folder: Path) -> Content:
    """The content of a folder that `from_pretrained` can load.

    Raises:
        InputError: it cannot: no such folder, no configuration or weights, files that are cut off or missing; or the
            card's metadata cannot be read, or an access token stands in a file.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name one that holds a saved model")
    config = _read_json(folder, CONFIG, "save_pretrained and `hf-simprune compress` write one")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{folder}/{CONFIG} names no model_type, so that nothing can load it")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    taken = {name for name in files if _PUBLISHED.fullmatch(name)}
    taken |= _weights(folder) | _code(folder, taken)
    _refuse_tokens(folder, taken)
    left_out = {_left(name, taken) for name in files if name not in taken}
    return Content(
        {name: files[name] for name in sorted(taken)}, model_type, tuple(sorted(left_out)), _warnings(folder, taken)
    )


def stale(remote: Iterable[str], content: Content) -> list[str]:
    """Files of an earlier version in the repository that the new one has no more, and that would be mixed with it."""
    return sorted(name for name in remote if _STALE.fullmatch(name) and name not in content.files)


def _weights(folder: Path) -> set[str]:
    """Names of the weights and, of several files, their index. Each file is opened, so that a cut one is noticed."""
    names = {_WEIGHTS}
    if not (folder / _WEIGHTS).is_file():
        if not (folder / _INDEX).is_file():
            raise InputError(f"{folder} holds no {_WEIGHTS}: save the model with save_pretrained")
        parts = _read_json(folder, _INDEX, "it says which file holds which weight").get("weight_map")
        if not isinstance(parts, dict) or not parts:
            raise InputError(f"{folder}/{_INDEX} names no files: save the model again")
        names = {_INDEX, *map(str, parts.values())}
    for name in sorted(names - {_INDEX}):
        if "/" in name or not (folder / name).is_file():
            raise InputError(f"{folder}/{_INDEX} names {name}, which is not there: save the model again")
        try:
            with safe_open(folder / name, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{folder}/{name} cannot be read ({error}): save the model again") from None
    return names


def _code(folder: Path, taken: set[str]) -> set[str]:
    """Source files that the `auto_map` of a configuration leads to, and those that they import beside them."""
    wanted = [module for name in sorted(taken) if name.endswith("config.json") for module in _mapped(folder, name)]
    found: set[str] = set()
    while wanted:
        name = f"{wanted.pop()}.py"
        if name in found:
            continue
        if not (folder / name).is_file():
            raise InputError(
                f"{folder}/{CONFIG}: its auto_map needs {name}, which is not there: save the model by "
                "hf_simprune.models.sharing.save_with_code"
            )
        found.add(name)
        try:
            tree = ast.parse((folder / name).read_bytes(), filename=name)
        except (SyntaxError, ValueError) as error:
            raise InputError(f"{folder}/{name} is no Python ({error}): save the model again") from None
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                wanted += [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
    return found


def _mapped(folder: Path, name: str) -> list[str]:
    """Modules of one configuration's `auto_map`, without those of other repositories ("user/name--module.Class")."""
    entries = _read_json(folder, name, "it belongs to the model").get("auto_map") or {}
    flat = [each for value in entries.values() for each in (value if isinstance(value, list) else [value])]
    return [each.split(".")[0] for each in flat if each and "--" not in each]


def _refuse_tokens(folder: Path, names: set[str]) -> None:
    for name in sorted(names):
        if name.endswith(TEXT_FILES) and TOKEN.search((folder / name).read_text(encoding="utf-8", errors="replace")):
            raise InputError(f"{folder}/{name} holds an access token (hf_…): take it out before others can read it")


def _warnings(folder: Path, names: set[str]) -> tuple[str, ...]:
    """What the model can do without."""
    found = []
    if not any(name.endswith("processor_config.json") for name in names):
        found.append("no image processor: users have to know how images are prepared")
    found += home_warnings(folder, names)
    if CARD not in names:
        return (*found, "no README.md: the model has no card")
    from .card_check import check_card

    text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    _check_metadata(folder, text)
    return (*found, *(f"{CARD}: {problem}" for problem in check_card(text, folder)))


def _check_metadata(folder: Path, text: str) -> None:
    """The Hub refuses a card whose metadata is no YAML; here before anything is made there."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        ModelCard(text, ignore_metadata_errors=True)
    except (ValueError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{folder}/{CARD}: its metadata cannot be read ({reason}): mend what is between the ---"
        ) from None


def _read_json(folder: Path, name: str, hint: str) -> dict[str, Any]:
    path = folder / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} holds no {name}: {hint}") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no object")
    return content


def _left(name: str, taken: Iterable[str]) -> str:
    """The uppermost folder of a file, with a slash, that holds nothing of `taken`; without one, the file itself."""
    parts = name.split("/")
    folders = ("/".join(parts[:depth]) + "/" for depth in range(1, len(parts)))
    return next((folder for folder in folders if not any(each.startswith(folder) for each in taken)), name)
