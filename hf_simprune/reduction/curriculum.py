# SPDX-License-Identifier: Apache-2.0
"""The sliding window of retained ranks: which similarities stay, from the start of training to its end.

Tokens are ranked by similarity, the most similar first. A window of K ranks is kept; its offset goes from 0 (the
most dissimilar pairs are pruned) to N - K (the most similar ones are).
"""

import torch
from torch import Tensor

from ..errors import InputError


CURRICULA = ("linear", "easy", "hard", "step")


def validate_curriculum(curriculum: str) -> None:
    """Raise InputError unless `curriculum` is one of CURRICULA."""
    if curriculum not in CURRICULA:
        raise InputError(f"curriculum {curriculum!r} is unknown: choose one of {', '.join(CURRICULA)}.")


def window_progress(curriculum: str, step: int, total_steps: int) -> float:
    """How far the window has moved, 0 to 1, at the 0-based optimizer step `step` of `total_steps`.

    "linear" moves with p = step / (total_steps - 1) (SimPrune); "easy" stays at 0, pruning dissimilar pairs;
    "hard" stays at 1, pruning similar pairs; "step" jumps from 0 to 1 at p = 0.5.
    Raises InputError for an unknown curriculum or a step outside of training.
    """
    validate_curriculum(curriculum)
    if not 0 <= step < total_steps:
        raise InputError(f"step {step} is not in a training of {total_steps} steps: give 0 to total_steps - 1.")
    if curriculum == "easy":
        return 0.0
    if curriculum == "hard":
        return 1.0
    fraction = step / (total_steps - 1) if total_steps > 1 else 0.0
    return fraction if curriculum == "linear" else float(fraction >= 0.5)


def window_offset(progress: Tensor, num_patches: int, keep: int) -> Tensor:
    """First retained rank round(progress * (num_patches - keep)), a 0-dim int64 tensor.

    A tensor, because a number would be a constant of a compiled graph and recompile it whenever the window moves.
    """
    return torch.round(progress * (num_patches - keep)).to(torch.int64)
