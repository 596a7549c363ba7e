# SPDX-License-Identifier: Apache-2.0
"""The losses and targets that DINOv2 (arXiv:2304.07193) adds to DINO, as functions of tensors.

M masked patch tokens, K prototypes, V student views, B images.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..loss import TeacherTargets


SINKHORN_ITERATIONS = 3
KOLEO_EPS = 1e-8


def koleo_loss(features: Tensor) -> Tensor:
    """Kozachenko-Leonenko estimate of negative entropy (arXiv:1806.03198): mean of -log distance to the nearest other.

    `features` (B, D), B of at least 2, are L2-normalised first; the nearest other row, among those of all ranks, is
    that of the largest cosine, found without gradient. Each rank passes as many rows and gets the mean over its own;
    the neighbours' gradients come back to their ranks. In at least fp32, autocast off.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1, eps=KOLEO_EPS)
        everyone, first = (_RowsOfAllRanks.apply(unit), dist.get_rank() * len(unit)) if _several_ranks() else (unit, 0)
        with torch.no_grad():
            cosines = unit @ everyone.t()
            cosines.diagonal(first).fill_(-2)  # not itself
            nearest = cosines.argmax(dim=1)
        distance = F.pairwise_distance(unit, everyone.index_select(0, nearest), eps=KOLEO_EPS)
        return -(distance + KOLEO_EPS).log().mean()


def masked_patch_loss(student: Tensor, targets: Tensor, weights: Tensor, num_views: int, temperature: float) -> Tensor:
    """Cross-entropy of masked patches (iBOT, arXiv:2111.07832): sum over m of weights_m · CE_m, by `num_views`.

    With weights of 1 / (masked patches of the view) it is the mean over views of the mean over their masked patches;
    a view without any counts as 0.

    Args:
        student: logits (M, K); M may be 0, the loss is then 0 with zero gradients.
        targets: (M, K), rows that sum to 1.
        weights: (M,).
        num_views: student views that could have been masked, 2B.
        temperature: of the student.
    """
    scaled = student / temperature
    entropies = scaled.logsumexp(dim=-1) - torch.linalg.vecdot(targets, scaled)
    return (entropies * weights).sum() / num_views


@torch.no_grad()
def sinkhorn_targets(logits: Tensor, temperature: float, iterations: int = SINKHORN_ITERATIONS) -> TeacherTargets:
    """Sinkhorn-Knopp centring (SwAV, arXiv:2006.09882) of the teacher's logits (M, K) over the rows of all ranks.

    Every iteration gives all prototypes the same total over the rows, then every row a total of 1. Each rank passes
    its own rows, as many as it has, none included, and gets targets (M, K) for them; all ranks must call it. Works on
    logarithms: with a sharp temperature plain exponentials underflow in fp32.
    """
    scores = logits / temperature
    for _ in range(iterations):
        # in place: with many prototypes and patches these are the largest tensors of a step
        scores.sub_(_logsumexp_of_all_rows(scores))
        scores.sub_(scores.logsumexp(dim=1, keepdim=True))
    probabilities = scores.exp_()
    # 0 · -inf would be NaN where a prototype got nothing at all
    entropy = torch.special.entr(probabilities).sum(dim=1)
    return TeacherTargets(probabilities, entropy.mean() if len(entropy) else entropy.sum())


class _RowsOfAllRanks(torch.autograd.Function):
    """(B, D) of every rank, one below the other; a rank's rows get the sum of the gradients from all ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank() * ctx.count :][: ctx.count]


def _logsumexp_of_all_rows(scores: Tensor) -> Tensor:
    """logsumexp over the rows of all ranks, (K,); a rank may have none."""
    if not _several_ranks():
        return scores.logsumexp(dim=0) if len(scores) else scores.new_zeros(scores.shape[1])
    highest = scores.amax(dim=0) if len(scores) else scores.new_full((scores.shape[1],), -torch.inf)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    highest = highest.clamp_min(torch.finfo(scores.dtype).min)  # no row anywhere
    total = (scores - highest).exp().sum(dim=0)
    dist.all_reduce(total)
    return total.log() + highest


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
