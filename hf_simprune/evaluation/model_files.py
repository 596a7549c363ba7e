# SPDX-License-Identifier: Apache-2.0
"""The files of a saved model, in a folder or on the Hub, of which weights are read no further than their headers."""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open

from ..errors import InputError
from ..models.untrusted import reading
from ..options.common import check_revision


_SMALL = ("config.json", "compression.json", "training/arguments.yaml", "README.md")


@dataclass(frozen=True)
class ModelFiles:
    """What can be said without loading weights.

    Attributes:
        place: as it was given.
        texts: content of the small files that are there, by name: config.json, compression.json,
            training/arguments.yaml, README.md.
        names: of all files.
        parameters: tensors' elements, by dtype as safetensors names it ("F32").
        weight_bytes: size of the weight files.
        commit: of a Hub model.
    """

    place: str
    texts: dict[str, str]
    names: tuple[str, ...]
    parameters: dict[str, int]
    weight_bytes: int
    commit: str | None = None

    def json(self, name: str) -> dict[str, Any]:
        """A small file's content, {} where it is missing.

        Raises:
            InputError: it is no JSON object.
        """
        if name not in self.texts:
            return {}
        try:
            content = json.loads(self.texts[name])
        except (ValueError, RecursionError) as error:
            raise InputError(f"--model_name_or_path {self.place}: {name} is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise InputError(f"--model_name_or_path {self.place}: {name} is no JSON object")
        return content


def short_name(place: str) -> str:
    """A model's name without the folders before it, `.` and the like resolved; a Hub name as it is."""
    path = Path(place).expanduser()
    return path.resolve().name or place if path.exists() else place


def open_files(place: str, revision: str | None = None, token: str | None = None) -> ModelFiles:
    """A folder that `save_pretrained` wrote, or a model on the Hub; without network, its copy in the cache.

    Raises:
        InputError: no such folder or Hub model, no config.json, or no weights in safetensors.
    """
    where = f"--model_name_or_path {place}"
    path = Path(place).expanduser()
    check_revision("model_revision", revision, place)
    if path.is_dir():
        return _of_folder(path, place)
    if path.exists() or path.is_absolute() or place.startswith(("~", ".")) or place.count("/") > 1:
        raise InputError(f"{where}: there is no such folder")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        with reading(f"{where}: neither a folder nor in the cache, and HF_HUB_OFFLINE is set"):
            return _of_folder(Path(snapshot_download(place, revision=revision, local_files_only=True)), place)
    with reading(f"{where}: no model there"):
        return _of_hub(place, revision, token)


def _of_folder(folder: Path, place: str) -> ModelFiles:
    texts = {}
    for name in _SMALL:
        if (folder / name).is_file():
            texts[name] = (folder / name).read_text(encoding="utf-8", errors="replace")
    names = tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
    _check(place, names)
    counts: Counter[str] = Counter()
    weights = sorted(folder.glob("*.safetensors"))
    for path in weights:
        try:
            with safe_open(path, framework="np") as opened:  # maps the file, and reads its header
                for key in opened.keys():
                    tensor = opened.get_slice(key)
                    counts[tensor.get_dtype()] += math.prod(tensor.get_shape())
        except (SafetensorError, OSError) as error:
            raise InputError(f"--model_name_or_path {place}: {path.name} cannot be read: {error}") from None
    return ModelFiles(place, texts, names, dict(counts), sum(path.stat().st_size for path in weights))


def _of_hub(repo_id: str, revision: str | None, token: str | None) -> ModelFiles:
    api = HfApi(token=token)
    commit = api.model_info(repo_id, revision=revision).sha
    sizes = {
        entry.path: entry.size
        for entry in api.list_repo_tree(repo_id, revision=commit, recursive=True)
        if hasattr(entry, "size")
    }
    _check(repo_id, tuple(sizes))
    texts = {}
    for name in _SMALL:
        if name in sizes:
            try:
                found = hf_hub_download(repo_id, name, revision=commit, token=token)
            except EntryNotFoundError:
                continue
            texts[name] = Path(found).read_text(encoding="utf-8", errors="replace")
    counts: Counter[str] = Counter()
    weights = [name for name in sizes if name.endswith(".safetensors") and "/" not in name]
    for name in weights:
        header = api.parse_safetensors_file_metadata(repo_id, name, revision=commit)
        for tensor in header.tensors.values():
            counts[tensor.dtype] += math.prod(tensor.shape)
    return ModelFiles(repo_id, texts, tuple(sorted(sizes)), dict(counts), sum(sizes[name] for name in weights), commit)


def _check(place: str, names: tuple[str, ...]) -> None:
    if "config.json" not in names:
        raise InputError(f"--model_name_or_path {place}: it holds no config.json, so it is no saved model")
    if not any(name.endswith(".safetensors") and "/" not in name for name in names):
        raise InputError(f"--model_name_or_path {place}: it holds no weights in safetensors")
