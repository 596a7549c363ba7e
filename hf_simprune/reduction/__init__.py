# SPDX-License-Identifier: Apache-2.0
"""Which tokens stay: tensors in, indices out. One file a method."""

from ..errors import InputError
from .base import (
    PairSelection,
    TokenReducer,
    default_reduction_layers,
    gather_tokens,
    keep_count,
    token_counts,
    validate_keep_rate,
    validate_reduction_layers,
)
from .curriculum import CURRICULA, validate_curriculum, window_offset, window_progress
from .random import RandomReducer
from .simprune import MATCHINGS, SimPruneReducer, validate_matching


REDUCTIONS = ("none", "random", "simprune")

__all__ = [
    "CURRICULA",
    "MATCHINGS",
    "REDUCTIONS",
    "PairSelection",
    "RandomReducer",
    "SimPruneReducer",
    "TokenReducer",
    "build_reducer",
    "default_reduction_layers",
    "gather_tokens",
    "keep_count",
    "token_counts",
    "validate_curriculum",
    "validate_keep_rate",
    "validate_matching",
    "validate_reduction_layers",
    "window_offset",
    "window_progress",
]


def build_reducer(name: str, keep_rate: float, matching: str = "one_way") -> TokenReducer | None:
    """The reducer called `name`, None for "none". `matching` is SimPrune's.

    Raises InputError for an unknown name or matching, or a keep rate outside (0, 1].
    """
    if name not in REDUCTIONS:
        raise InputError(f"token_reduction {name!r} is unknown: choose one of {', '.join(REDUCTIONS)}.")
    validate_keep_rate(keep_rate)
    validate_matching(matching)
    if name == "none":
        return None
    return SimPruneReducer(keep_rate, matching) if name == "simprune" else RandomReducer(keep_rate)
