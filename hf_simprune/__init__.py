# SPDX-License-Identifier: Apache-2.0
"""Cheaper vision transformers: DINO pretraining with SimPrune token reduction, and removal of redundant blocks (RBA).

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
        SimPruneDinov2Config,
        SimPruneDinov2ForImageClassification,
        SimPruneDinov2Model,
        SimPruneViTConfig,
        SimPruneViTForImageClassification,
        SimPruneViTModel,
    )
    from .rba.analysis import analyze
    from .rba.converter import convert
    from .rba.plan import CompressionPlan, Half, Span
    from .rba.report import RedundancyReport
    from .rba.search import choose
    from .reduction import build_reducer

__version__ = "0.1.0"

_HOME = {
    "CompressionPlan": ".rba.plan",
    "DinoArguments": ".dino.arguments",
    "DinoTrainer": ".dino.trainer",
    "Half": ".rba.plan",
    "RedundancyReport": ".rba.report",
    "SimPruneDeiTConfig": ".models",
    "SimPruneDeiTForImageClassification": ".models",
    "SimPruneDeiTModel": ".models",
    "SimPruneDinov2Config": ".models",
    "SimPruneDinov2ForImageClassification": ".models",
    "SimPruneDinov2Model": ".models",
    "SimPruneViTConfig": ".models",
    "SimPruneViTForImageClassification": ".models",
    "SimPruneViTModel": ".models",
    "Span": ".rba.plan",
    "analyze": ".rba.analysis",
    "build_reducer": ".reduction",
    "choose": ".rba.search",
    "convert": ".rba.converter",
}

__all__ = [
    "CompressionPlan",
    "DinoArguments",
    "DinoTrainer",
    "Half",
    "InputError",
    "RedundancyReport",
    "SimPruneDeiTConfig",
    "SimPruneDeiTForImageClassification",
    "SimPruneDeiTModel",
    "SimPruneDinov2Config",
    "SimPruneDinov2ForImageClassification",
    "SimPruneDinov2Model",
    "SimPruneViTConfig",
    "SimPruneViTForImageClassification",
    "SimPruneViTModel",
    "Span",
    "analyze",
    "build_reducer",
    "choose",
    "convert",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
