# SPDX-License-Identifier: Apache-2.0
"""Cheaper vision transformers: DINO pretraining with SimPrune token reduction, and removal of redundant blocks (RBA).

The public names are loaded on first use (PEP 562): importing this package imports neither torch nor transformers and
registers nothing. The Auto classes learn of the models when `hf_simprune.models` is imported.

Train with `DinoTrainer` (or `hf-simprune train`), compress with `compress`, or step by step with `analyze`, `plan` and
`convert`; measure with `evaluate_knn` and `evaluate_linear`; put the result on the Hub with `publish`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import InputError


if TYPE_CHECKING:
    from .dino.arguments import DinoArguments
    from .dino.trainer import DinoTrainer
    from .evaluation.frozen import evaluate_knn, evaluate_linear
    from .hub.publish import publish
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
    from .rba.compression import compress, plan
    from .rba.converter import convert
    from .rba.plan import CompressionPlan, Half, Span
    from .rba.report import RedundancyReport
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
    "compress": ".rba.compression",
    "convert": ".rba.converter",
    "evaluate_knn": ".evaluation.frozen",
    "evaluate_linear": ".evaluation.frozen",
    "plan": ".rba.compression",
    "publish": ".hub.publish",
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
    "compress",
    "convert",
    "evaluate_knn",
    "evaluate_linear",
    "plan",
    "publish",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
