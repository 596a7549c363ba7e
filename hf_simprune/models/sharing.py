# SPDX-License-Identifier: Apache-2.0
"""A model of this package saved with the code it needs, for people without the package."""

import inspect
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from ..errors import InputError
from ..reduction.methods import INFERENCE_METHODS
from .bundle import bundle_reduction
from .deit import SimPruneDeiTConfig, SimPruneDeiTForImageClassification, SimPruneDeiTModel
from .dinov2 import SimPruneDinov2Config, SimPruneDinov2ForImageClassification, SimPruneDinov2Model
from .vit import SimPruneViTConfig, SimPruneViTForImageClassification, SimPruneViTModel


# Configuration, backbone and classifier of each family.
_FAMILIES = (
    (SimPruneViTConfig, SimPruneViTModel, SimPruneViTForImageClassification),
    (SimPruneDeiTConfig, SimPruneDeiTModel, SimPruneDeiTForImageClassification),
    (SimPruneDinov2Config, SimPruneDinov2Model, SimPruneDinov2ForImageClassification),
)
_AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForImageClassification")


def save_with_code(model: PreTrainedModel, folder: str | Path) -> None:
    """Write `model` into `folder` with its family's source files, which the configuration points to.

    Of token reduction, the folder gets the one method that the configuration names, as a file of its own.

    With this package imported, the Auto classes load the folder as any other. Without it they load it under
    `trust_remote_code=True`. The model is left as it is.

    Raises:
        InputError: `model` is of no class of this package, or its configuration names no method for inference.
    """
    family = next((classes for classes in _FAMILIES if type(model) in classes), None)
    if family is None:
        raise InputError(
            f"save_with_code takes a model of this package, got {type(model).__name__}: "
            "a stock model needs no code, save it with save_pretrained"
        )
    config = model.config
    if config.token_reduction not in (None, *INFERENCE_METHODS):
        raise InputError(
            f"save_with_code: token_reduction {config.token_reduction!r} is not for inference: choose one of "
            f"{', '.join(INFERENCE_METHODS)}"
        )
    code = bundle_reduction(config.token_reduction)
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
    for file in Path(folder).glob("reduction_simprune_*.py"):
        file.write_text(code, encoding="utf-8")
