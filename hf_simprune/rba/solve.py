# SPDX-License-Identifier: Apache-2.0
"""Least squares from second moments: one eigendecomposition of the input's moments serves every output."""

import torch
from torch import Tensor


_ROUNDING = torch.finfo(torch.float32).eps


class LeftSolver:
    """Solves (S + lambda I) X = P for many P, with lambda = ridge * tr(S) / D.

    Without a ridge the features are scaled to one variance first: the answer is the same, and directions that the
    data does not span are told from rounding, which is relative to each feature's own size. Along those directions X
    is zero; `deficient` says whether there are any.

    Args:
        moments: S (D, D), fp64, symmetric.
        ridge: in units of the mean variance, at least 0.
    """

    def __init__(self, moments: Tensor, ridge: float):
        variances = moments.diagonal()
        self.penalty = ridge * float(variances.mean())
        if self.penalty > 0:
            self._scale = torch.ones_like(variances)
        else:
            self._scale = torch.where(variances > _ROUNDING**2 * variances.max(), variances, 1).sqrt()
        values, self._vectors = torch.linalg.eigh(moments / torch.outer(self._scale, self._scale))
        values = values.clamp_min(0) + self.penalty
        # Moments are products in fp32: without a ridge, what lies below its rounding carries no information.
        spanned = values > (0.0 if self.penalty > 0 else _ROUNDING) * values[-1]
        self.deficient = not bool(spanned.all())
        self._inverse = torch.where(spanned, 1 / values, 0)

    def solve(self, right: Tensor) -> Tensor:
        """P (D, K) fp64 -> X (D, K)."""
        rotated = self._vectors.mT @ (right / self._scale[:, None])
        return (self._vectors @ (self._inverse[:, None] * rotated)) / self._scale[:, None]
