# SPDX-License-Identifier: Apache-2.0
"""What the files beside this one need for token reduction.

A saved folder has in its place one file of this name with the code itself, see `models/bundle.py`.
"""

from ...reduction.attention import attend_pooled, seen_of_attention
from ...reduction.base import BranchReducer
from ...reduction.inference import reducer_of
from ...reduction.methods import INFERENCE_METHODS
from ...reduction.walk import BranchWalk, ReductionStep


__all__ = [
    "INFERENCE_METHODS",
    "BranchReducer",
    "BranchWalk",
    "ReductionStep",
    "attend_pooled",
    "reducer_of",
    "seen_of_attention",
]
