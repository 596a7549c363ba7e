# SPDX-License-Identifier: Apache-2.0
"""Records which tokens left or merged in both views at the start, middle and end of the curriculum."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..atomic import new_file
from .dual_branch import DualBranch
from .engine import Views
from .schedules import StepValues


MOMENTS = ("start", "middle", "end")
NUM_IMAGES = 3


def moment_steps(total_steps: int) -> dict[int, tuple[str, ...]]:
    """Optimiser steps before which a snapshot is taken, and its moments: in runs of a step or two they coincide."""
    steps = (0, (total_steps - 1) // 2, total_steps - 1)
    return {step: tuple(name for name, at in zip(MOMENTS, steps, strict=True) if at == step) for step in steps}


def follow_tokens(groups: Sequence[Tensor]) -> Tensor:
    """The token that each patch of a crop is in after every stage: (rows, stages, patches) int64, -1 from where it was
    dropped on.

    `groups[s]` (rows, n_s) is `TokenMap.groups()` of stage s: for each token that enters, the one it goes into.
    """
    tokens = groups[0]
    followed = [tokens]
    for stage in groups[1:]:
        tokens = torch.where(tokens < 0, tokens, stage.gather(1, tokens.clamp_min(0)))
        followed.append(tokens)
    return torch.stack(followed, dim=1)


def stage_dropped(followed: Tensor) -> Tensor:
    """Per patch, the stage (counted from 1) at which it left, or 0 if it stayed: (rows, patches) from the tokens of
    `follow_tokens`, (rows, stages, patches)."""
    survived = (followed >= 0).sum(dim=1)
    return torch.where(survived == followed.shape[1], 0, survived + 1)


class PruningSnapshots:
    """Passes the same few images through both branches at each moment and keeps the maps in one safetensors file.

    File contents: `views` (n, 2, C, H, W), the normalised crops that student and teacher saw, and for each moment, of
    the student in view 0 and of the teacher in view 1: `<moment>` (n, 2, patches), `stage_dropped`, and
    `<moment>_tokens` (n, 2, stages, patches), `follow_tokens`.
    """

    def __init__(self, path: Path, model: DualBranch, total_steps: int) -> None:
        self.path = path
        self.model = model
        self.moments = moment_steps(total_steps)

    def __call__(self, step: int, views: Views, values: StepValues) -> None:
        """Record the moment of `step`; random states are left untouched."""
        stored = load_file(self.path) if self.path.exists() and step > 0 else {}
        if "views" not in stored:
            both = views.global_crops.unflatten(0, (2, -1)).transpose(0, 1)
            stored = {"views": both[:NUM_IMAGES].float().cpu().contiguous()}
        device = next(self.model.parameters()).device
        crops = stored["views"].to(device, views.global_crops.dtype).transpose(0, 1).flatten(0, 1)
        progress = torch.tensor(values.window_progress, dtype=torch.float32, device=crops.device)
        self.model.eval()
        devices = [crops.device] if crops.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            maps = self.model(crops, None, progress).maps
        self.model.train()
        if not maps:
            return
        student, teacher = (follow_tokens([stage[branch].groups() for stage in maps]) for branch in (0, 1))
        n = len(crops) // 2
        followed = torch.stack([student[:n], teacher[n:]], dim=1)
        for moment in self.moments[step]:
            stored[moment] = stage_dropped(followed.flatten(0, 1)).unflatten(0, (n, 2)).cpu()
            stored[f"{moment}_tokens"] = followed.to(torch.int32).cpu()
        with new_file(self.path) as partial:
            save_file(stored, partial)
