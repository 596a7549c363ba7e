# SPDX-License-Identifier: Apache-2.0
"""AdamW as DINO configures it: parameter groups and gradient clipping, for whole parameters and for sharded ones."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .sharding import own_parts, whole


LAST_LAYER = "last_layer."


def is_regularised(name: str, parameter: Tensor) -> bool:
    """DINO decays everything but biases and vectors; class token and position embeddings (3-d) are decayed."""
    return not (name.endswith(".bias") or parameter.ndim == 1)


def parameter_groups(module: nn.Module) -> list[dict]:
    """Two AdamW groups, decayed first; `names` lists the parameters of a group in order."""
    groups: list[dict] = [{"params": [], "names": []}, {"params": [], "names": [], "weight_decay": 0.0}]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            group = groups[0 if is_regularised(name, parameter) else 1]
            group["params"].append(parameter)
            group["names"].append(name)
    return groups


def build_optimizer(module: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW over `parameter_groups`; learning rate and weight decay are set at every step by the schedules."""
    return torch.optim.AdamW(parameter_groups(module), lr=0.0, fused=True)


def drop_last_layer_gradients(module: nn.Module) -> None:
    """Forget the gradients of the prototypes while DINO keeps them frozen."""
    for name, parameter in module.named_parameters():
        if LAST_LAYER in name:
            parameter.grad = None


def clip_global_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most `max_norm`; returns the norm before clipping."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    if max_norm is not None:
        _scale(own_parts(gradients), (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def clip_each_parameter(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """DINO's own clipping: each parameter's gradient to `max_norm` by itself; returns the joint norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = whole(torch.stack(torch._foreach_norm(gradients)))
    _scale(own_parts(gradients), (max_norm / (norms + 1e-6)).clamp(max=1.0))
    return torch.linalg.vector_norm(norms)


def _scale(tensors: list[Tensor], factors: Tensor) -> None:
    """Multiply each of n tensors in place by its factor, (n,), or all by one, 0-dim."""
    if factors.device.type == "cpu":  # to look costs nothing there, and most gradients are left as they are
        each = factors.expand(len(tensors)).tolist()
        pairs = [(tensor, factor) for tensor, factor in zip(tensors, each, strict=True) if factor != 1]
        if pairs:
            torch._foreach_mul_(*map(list, zip(*pairs)))
    else:
        torch._foreach_mul_(tensors, list(factors.unbind()) if factors.ndim else factors)
