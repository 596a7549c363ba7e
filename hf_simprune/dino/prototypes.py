# SPDX-License-Identifier: Apache-2.0
"""Weight-normalised linear layer without the normalised weight.

With 65,536 prototypes the normalised copy of the weight, its gradient and the temporaries of `weight_norm` cost more
time than the matrix products of a small batch. Scaling the logits instead is the same function.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


_FEW_ROWS = 256


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, directions: Tensor, lengths: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(directions, dim=1)
        product = _product(inputs, directions)
        scale = lengths.squeeze(1) / norms
        logits = product * scale if product.dtype != scale.dtype else product.mul_(scale)
        ctx.save_for_backward(inputs, directions, lengths, norms, logits)
        ctx.compute_dtype = product.dtype
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs, directions, lengths, norms, logits = ctx.saved_tensors
        dtype = ctx.compute_dtype
        scaled = (gradient * (lengths.squeeze(1) / norms)).to(dtype)
        along = torch.linalg.vecdot(gradient, logits, dim=0)  # derivative with respect to ln(length)
        to_inputs = (scaled @ directions.to(dtype)).to(inputs.dtype)
        to_directions = (scaled.t() @ inputs.to(dtype)).to(directions.dtype)
        to_directions.addcmul_(directions, (along / norms.square()).unsqueeze(1), value=-1)
        to_lengths = along.unsqueeze(1) / lengths if ctx.needs_input_grad[2] else None
        return to_inputs, to_directions, to_lengths


def _product(inputs: Tensor, directions: Tensor) -> Tensor:
    """`F.linear` in autocast's precision, where it is on and pays."""
    if inputs.device.type != "cpu" or len(inputs) >= _FEW_ROWS:
        return F.linear(inputs, directions)
    # on a CPU, casting all prototypes takes longer than multiplying a few rows by them as they are
    with torch.autocast("cpu", enabled=False):
        return F.linear(inputs.to(directions.dtype), directions)


def scaled_linear(inputs: Tensor, directions: Tensor, lengths: Tensor) -> Tensor:
    """`F.linear(inputs, lengths * directions / ‖directions‖)` with norms of rows: (B, D), (K, D), (K, 1) -> (B, K).

    Under autocast the matrix products run in its precision (on a CPU, of 256 rows or more); the scaling and the result
    are in that of `directions`.
    """
    return _ScaledLinear.apply(inputs, directions, lengths)
