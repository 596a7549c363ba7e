# SPDX-License-Identifier: Apache-2.0
"""Which tokens stay: tensors in, what becomes of the tokens out. One file a method, one line a method in `methods`."""

from .base import (
    BranchReducer,
    PairReducer,
    PairSelection,
    ReductionSetting,
    Seen,
    Selection,
    TokenReducer,
    default_reduction_layers,
    keep_count,
    token_counts,
    validate_keep_rate,
    validate_reduction_layers,
)
from .curriculum import CURRICULA, validate_curriculum, window_offset, window_progress
from .methods import METHODS, REDUCTIONS, build_reducer, check_reduction, method_options, parse_options
from .random import RandomReducer
from .simprune import MATCHINGS, SimPruneReducer, validate_matching
from .token_maps import Kept, TokenMap, gather_tokens
from .walk import BranchWalk, ReductionStep


__all__ = [
    "CURRICULA",
    "MATCHINGS",
    "METHODS",
    "REDUCTIONS",
    "BranchReducer",
    "BranchWalk",
    "Kept",
    "PairReducer",
    "PairSelection",
    "RandomReducer",
    "ReductionSetting",
    "ReductionStep",
    "Seen",
    "Selection",
    "SimPruneReducer",
    "TokenMap",
    "TokenReducer",
    "build_reducer",
    "check_reduction",
    "default_reduction_layers",
    "gather_tokens",
    "keep_count",
    "method_options",
    "parse_options",
    "token_counts",
    "validate_curriculum",
    "validate_keep_rate",
    "validate_matching",
    "validate_reduction_layers",
    "window_offset",
    "window_progress",
]
