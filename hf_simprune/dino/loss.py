# SPDX-License-Identifier: Apache-2.0
"""The DINO loss and its centre (https://huggingface.co/papers/2104.14294), as pure functions of tensors."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class TeacherTargets(NamedTuple):
    """What the student is trained towards.

    probabilities: (2B, K) centred, sharpened softmax of the teacher's logits; entropy: 0-dim, their mean, in nats.
    """

    probabilities: Tensor
    entropy: Tensor


def teacher_targets(teacher_logits: Tensor, center: Tensor, temperature: float) -> TeacherTargets:
    """Centre and sharpen the teacher's (2B, K) logits; `center` is (K,). Computed in at least fp32."""
    scaled = (teacher_logits - center) / temperature
    probabilities = scaled.softmax(dim=-1)
    entropy = scaled.logsumexp(dim=-1) - (probabilities * scaled).sum(dim=-1)
    return TeacherTargets(probabilities, entropy.mean())


def dino_loss(student_logits: Tensor, targets: Tensor, num_views: int, temperature: float) -> Tensor:
    """Mean cross-entropy over every pair (teacher view q, student view v ≠ q).

    The sum over pairs needs only the student's logits summed over views and one log-sum-exp a view, because
    each row of `targets` sums to 1:  Σ_q Σ_{v≠q} −t_q·log s_v = Σ_q [Σ_{v≠q} lse_v − t_q·(Σ_v z_v − z_q)].

    Args:
        student_logits: (V·B, K), view-major, the global views first.
        targets: (Q·B, K), view-major; teacher view q shows the same crop as student view q.
        num_views: V.
        temperature: of the student.
    """
    logits = student_logits.unflatten(0, (num_views, -1))  # (V, B, K)
    targets = targets.unflatten(0, (-1, logits.shape[1]))  # (Q, B, K)
    return _CrossEntropyOfPairs.apply(logits, targets, temperature)


class _CrossEntropyOfPairs(torch.autograd.Function):
    """View by view: with many prototypes, passes over the logits of all views at once are bound by memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        views, batch, _ = logits.shape
        normaliser = logits.new_empty(views, batch)
        total = logits.new_zeros(())
        target_sum = targets.sum(dim=0)
        for view, (pairs, wanted) in enumerate(_targets_of_views(targets, target_sum, views)):
            scaled = logits[view] / temperature
            torch.logsumexp(scaled, dim=-1, out=normaliser[view])
            total += pairs * normaliser[view].sum() - torch.dot(wanted.flatten(), scaled.flatten())
        ctx.save_for_backward(logits, targets, target_sum, normaliser)
        ctx.temperature = temperature
        return total / _count_of_pairs(logits, targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, target_sum, normaliser = ctx.saved_tensors
        scale = gradient / (_count_of_pairs(logits, targets) * ctx.temperature)
        to_logits = torch.empty_like(logits)
        for view, (pairs, wanted) in enumerate(_targets_of_views(targets, target_sum, len(logits))):
            here = torch.div(logits[view], ctx.temperature, out=to_logits[view])
            here.sub_(normaliser[view].unsqueeze(-1)).exp_().mul_(pairs).sub_(wanted).mul_(scale)
        return to_logits, None, None


def _targets_of_views(targets: Tensor, target_sum: Tensor, views: int) -> Iterator[tuple[int, Tensor]]:
    """For each student view the number of teacher views it is paired with and the sum (B, K) of their targets."""
    for view in range(views):
        if view < len(targets):  # the crop that this teacher view shows too
            yield len(targets) - 1, target_sum - targets[view]
        else:
            yield len(targets), target_sum


def _count_of_pairs(logits: Tensor, targets: Tensor) -> int:
    return len(targets) * (len(logits) - 1) * logits.shape[1]


def updated_center(center: Tensor, logit_sum: Tensor, count: int, momentum: float) -> Tensor:
    """Exponential moving average of the teacher's mean logit: `logit_sum` (K,) over `count` rows of all ranks."""
    return center * momentum + (logit_sum / count) * (1 - momentum)


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of the centred (B, D) features (Roy & Vetterli, 2007).

    1 for features on a line (or all equal), up to min(B − 1, D) for features spread evenly.
    """
    centred = features.float() - features.float().mean(dim=0)
    values = torch.linalg.svdvals(centred)
    shares = values / values.sum().clamp_min(1e-12)
    return torch.exp(torch.special.entr(shares).sum())


def feature_std(features: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of L2-normalised (B, D) features; 0 when all are equal."""
    return torch.nn.functional.normalize(features.float(), dim=-1).std(dim=0, correction=0).mean()
