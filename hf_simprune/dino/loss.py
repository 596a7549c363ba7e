# SPDX-License-Identifier: Apache-2.0
"""The DINO loss and its centre (https://huggingface.co/papers/2104.14294), as pure functions of tensors."""

from typing import NamedTuple

import torch
from torch import Tensor


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
    logits = (student_logits / temperature).unflatten(0, (num_views, -1))  # (V, B, K)
    normaliser = logits.logsumexp(dim=-1)  # (V, B)
    batch = logits.shape[1]
    targets = targets.unflatten(0, (-1, batch))  # (Q, B, K)
    num_teacher_views = targets.shape[0]
    own = slice(0, num_teacher_views)
    others = logits.sum(dim=0) - logits[own]  # (Q, B, K): all views but the teacher's own
    cross = (normaliser.sum(dim=0) - normaliser[own]) - (targets * others).sum(dim=-1)
    return cross.sum() / (batch * num_teacher_views * (num_views - 1))


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
