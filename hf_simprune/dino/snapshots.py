# SPDX-License-Identifier: Apache-2.0
"""Records which tokens were pruned in both views at the start, middle and end of the curriculum."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .dual_branch import DualBranch
from .engine import Views
from .schedules import StepValues


MOMENTS = ("start", "middle", "end")
NUM_IMAGES = 3


def moment_steps(total_steps: int) -> dict[int, tuple[str, ...]]:
    """Optimiser steps before which a snapshot is taken, and its moments: in runs of a step or two they coincide."""
    steps = (0, (total_steps - 1) // 2, total_steps - 1)
    return {step: tuple(name for name, at in zip(MOMENTS, steps, strict=True) if at == step) for step in steps}


def stage_dropped(kept: list[Tensor], num_patches: int) -> Tensor:
    """Per patch, the reduction (counted from 1) at which it left, or 0 if it stayed: (rows, num_patches) int64.

    `kept[s]` are the indices (rows, K_s) kept at reduction s, counted among the patches that entered it.
    """
    rows = kept[0].shape[0]
    alive = torch.arange(num_patches, device=kept[0].device).expand(rows, num_patches)
    result = torch.zeros(rows, num_patches, dtype=torch.int64, device=kept[0].device)
    for stage, keep in enumerate(kept, start=1):
        survivors = alive.gather(1, keep)
        left = torch.ones_like(result, dtype=torch.bool).scatter(1, survivors, False)
        result[left & (result == 0)] = stage
        alive = survivors
    return result


class PruningSnapshots:
    """Passes the same few images through both branches at each moment and keeps the maps in one safetensors file.

    File contents: `views` (n, 2, C, H, W), the normalised crops that student and teacher saw, and for each moment
    `<moment>` (n, 2, patches): `stage_dropped` of the student in view 0 and of the teacher in view 1.
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
        crops = stored["views"].to(views.global_crops).transpose(0, 1).flatten(0, 1)
        progress = torch.tensor(values.window_progress, dtype=torch.float32, device=crops.device)
        self.model.eval()
        devices = [crops.device] if crops.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            kept = self.model(crops, None, progress).kept
        self.model.train()
        if not kept:
            return
        patches = self.model.student.backbone.embed(crops[:1]).shape[1] - self.model.student.backbone.num_prefix_tokens
        student, teacher = (stage_dropped([stage[branch] for stage in kept], patches) for branch in (0, 1))
        n = len(crops) // 2
        for moment in self.moments[step]:
            stored[moment] = torch.stack([student[:n], teacher[n:]], dim=1).cpu()
        save_file(stored, self.path)
