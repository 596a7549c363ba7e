# SPDX-License-Identifier: Apache-2.0
"""A model of this package saved with the code it needs, for people without the package."""

import inspect
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from ..errors import InputError
from .deit import SimPruneDeiTConfig, SimPruneDeiTForImageClassification, SimPruneDeiTModel
from .vit import SimPruneViTConfig, SimPruneViTForImageClassification, SimPruneViTModel


# Configuration, backbone and classifier of each family.
_FAMILIES = (
    (SimPruneViTConfig, SimPruneViTModel, SimPruneViTForImageClassification),
    (SimPruneDeiTConfig, SimPruneDeiTModel, SimPruneDeiTForImageClassification),
)
_AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForImageClassification")


def save_with_code(model: PreTrainedModel, folder: str | Path) -> None:
    """Write `model` into `folder` with its family's source files, which the configuration points to.

    With this package imported, the Auto classes load the folder as any other. Without it they load it under
    `trust_remote_code=True`. The model is left as it is.

    Raises:
        InputError: `model` is of no class of this package.
    """
    family = next((classes for classes in _FAMILIES if type(model) in classes), None)
    if family is None:
        raise InputError(
            f"save_with_code takes a model of this package, got {type(model).__name__}: "
            "a stock model needs no code, save it with save_pretrained"
        )
    config = model.config
    before = dict(vars(config))
    config.auto_map = {
        auto: f"{found.__module__.rpartition('.')[2]}.{found.__name__}"
        for auto, found in zip(_AUTO_CLASSES, family, strict=True)
    }
    try:
        model.save_pretrained(folder)
    finally:
        del config.auto_map
        if "auto_map" in before:
            config.auto_map = before["auto_map"]
    for file in Path(inspect.getfile(type(model))).parent.glob("*_simprune_*.py"):
        shutil.copyfile(file, Path(folder) / file.name)
