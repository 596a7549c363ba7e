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
from .evit import EViTReducer
from .expedit import ExpeditReducer
from .mctf import MCTFReducer
from .methods import METHODS, REDUCTIONS, build_reducer, check_reduction, method_options, parse_options
from .patch_slimming import PatchSlimmingReducer
from .random import RandomReducer
from .self_slimmed import SelfSlimmedReducer
from .simprune import MATCHINGS, SimPruneReducer, validate_matching
from .simprune_dynamic import SimPruneDynamicReducer
from .token_maps import Fused, Kept, Merged, Mixed, TokenMap, Unchanged, gather_tokens
from .tome import ToMeReducer
from .walk import BranchWalk, ReductionStep


__all__ = [
    "CURRICULA",
    "MATCHINGS",
    "METHODS",
    "REDUCTIONS",
    "BranchReducer",
    "BranchWalk",
    "EViTReducer",
    "ExpeditReducer",
    "Fused",
    "Kept",
    "MCTFReducer",
    "Merged",
    "Mixed",
    "PairReducer",
    "PairSelection",
    "PatchSlimmingReducer",
    "RandomReducer",
    "ReductionSetting",
    "ReductionStep",
    "Seen",
    "Selection",
    "SelfSlimmedReducer",
    "SimPruneDynamicReducer",
    "SimPruneReducer",
    "ToMeReducer",
    "TokenMap",
    "TokenReducer",
    "Unchanged",
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
