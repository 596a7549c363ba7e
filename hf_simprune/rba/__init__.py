# SPDX-License-Identifier: Apache-2.0
"""Which blocks go: measure what is redundant, plan within a budget, convert the model (RBA, arXiv 2410.04941).

The public names are loaded on first use (PEP 562): importing this package or its planner imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .analysis import analyze
    from .converter import convert
    from .plan import CompressionPlan, Half, Span
    from .report import RedundancyReport
    from .search import choose

_HOME = {
    "CompressionPlan": ".plan",
    "Half": ".plan",
    "RedundancyReport": ".report",
    "Span": ".plan",
    "analyze": ".analysis",
    "choose": ".search",
    "convert": ".converter",
}

__all__ = ["CompressionPlan", "Half", "RedundancyReport", "Span", "analyze", "choose", "convert"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
