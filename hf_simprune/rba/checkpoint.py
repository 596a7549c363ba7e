# SPDX-License-Identifier: Apache-2.0
"""The network to compress and its image processor, loaded completely or refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from .. import models  # noqa: F401  (makes the Auto classes know this package's models)
from ..errors import InputError
from ..models.untrusted import check_config, reading
from ..options.common import check_revision


# Auto classes that a checkpoint's architecture asks for; all others are backbones.
_LOADERS = {
    "ForImageClassification": AutoModelForImageClassification,
    "ForImageClassificationWithTeacher": AutoModelForImageClassification,
    "CLIPVisionModelWithProjection": CLIPVisionModelWithProjection,
}


@dataclass(frozen=True)
class Checkpoint:
    """A network in eval mode with its image processor; `loader` is the class whose `from_pretrained` gives it."""

    model: PreTrainedModel
    processor: BaseImageProcessor
    loader: Any


def load_checkpoint(name_or_path: str, revision: str | None = None, token: str | None = None) -> Checkpoint:
    """Load a vision transformer in the precision it is stored in.

    Raises:
        InputError: there is no such model, it has no image processor, its weights are incomplete, or the revision is
            that of a folder.
    """
    where = f"--model_name_or_path {name_or_path}"
    check_revision("model_revision", revision, name_or_path)
    _check_folder(name_or_path, where)
    hub: dict[str, Any]
    hub = {key: value for key, value in {"revision": revision, "token": token}.items() if value is not None}
    hub["trust_remote_code"] = False  # and nobody is asked on the terminal whether to run what is there
    with reading(f"{where}: no model there"):
        check_config(name_or_path, **hub)
        config = AutoConfig.from_pretrained(name_or_path, **hub)
        loader = loader_of((config.architectures or [""])[0])
    with reading(f"{where}: it cannot be loaded"):
        model, info = loader.from_pretrained(
            name_or_path, dtype="auto", output_loading_info=True, use_safetensors=True, **hub
        )
        missing = sorted(info["missing_keys"])
        if missing and all("pooler." in key for key in missing):
            # a pooler that no one trained would be drawn at random
            model = loader.from_pretrained(
                name_or_path, dtype="auto", add_pooling_layer=False, use_safetensors=True, **hub
            )
            missing = []
    if missing or info["mismatched_keys"]:
        wrong = missing or sorted(str(key) for key in info["mismatched_keys"])
        raise InputError(f"{where}: its weights do not fit its configuration, for example {wrong[0]}")
    with reading(f"{where}: no image processor there"):
        processor = AutoImageProcessor.from_pretrained(name_or_path, backend="pil", **hub)
    return Checkpoint(model.eval(), processor, loader)


def loader_of(architecture: str) -> Any:
    """The class that loads a checkpoint of this architecture."""
    for ending, loader in _LOADERS.items():
        if architecture.endswith(ending):
            return loader
    return AutoModel


def _check_folder(name: str, where: str) -> None:
    path = Path(name).expanduser()
    if path.is_file():
        raise InputError(f"{where} is a file: name the folder that save_pretrained wrote, or a Hub model")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{where}: that folder holds no config.json, so it is no saved model")
    if not path.exists() and (path.is_absolute() or name.startswith(("~", ".")) or len(path.parts) > 2):
        raise InputError(f"{where}: there is no such folder")
