# SPDX-License-Identifier: Apache-2.0
"""DINO pretraining of vision transformers with SimPrune token reduction.

The public names are loaded on first use (PEP 562): importing this package imports neither torch nor transformers and
registers nothing. The Auto classes learn of the models when `hf_simprune.models` is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import InputError


if TYPE_CHECKING:
    from .dino.arguments import DinoArguments
    from .dino.trainer import DinoTrainer
    from .models import (
        SimPruneDeiTConfig,
        SimPruneDeiTForImageClassification,
        SimPruneDeiTModel,
        SimPruneViTConfig,
        SimPruneViTForImageClassification,
        SimPruneViTModel,
    )
    from .reduction import build_reducer

__version__ = "0.1.0"

_HOME = {
    "DinoArguments": ".dino.arguments",
    "DinoTrainer": ".dino.trainer",
    "SimPruneDeiTConfig": ".models",
    "SimPruneDeiTForImageClassification": ".models",
    "SimPruneDeiTModel": ".models",
    "SimPruneViTConfig": ".models",
    "SimPruneViTForImageClassification": ".models",
    "SimPruneViTModel": ".models",
    "build_reducer": ".reduction",
}

__all__ = [
    "DinoArguments",
    "DinoTrainer",
    "InputError",
    "SimPruneDeiTConfig",
    "SimPruneDeiTForImageClassification",
    "SimPruneDeiTModel",
    "SimPruneViTConfig",
    "SimPruneViTForImageClassification",
    "SimPruneViTModel",
    "build_reducer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
