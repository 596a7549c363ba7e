# SPDX-License-Identifier: Apache-2.0
"""The maps that the papers train instead of solving for: a small MLP and a residual one (TOAST, arXiv 2410.04941)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import InputError
from ..models.vit.maps_simprune_vit import MLPMap, ResMLPMap
from .maps import TRAINED, ModuleMap


_MODULES = dict(zip(TRAINED, (MLPMap, ResMLPMap), strict=True))


@torch.inference_mode(False)
@torch.enable_grad()
def fit_trained(
    kind: str,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 300,
    learning_rate: float = 1e-3,
    batch: int = 8192,
    seed: int = 0,
) -> ModuleMap:
    """A map from tokens `x` to tokens `y`, trained with Adam on the mean squared error.

    Args:
        kind: "mlp" (D to D/2, GELU, back to D) or "res_mlp" (norm, SiLU feed-forward with dropout and residual, norm).
        x, y: (N, D) of any floating dtype, on one device: `hidden_states[start]` and `hidden_states[end]`, flattened.
        steps: of Adam.
        learning_rate: constant.
        batch: tokens a step, drawn without replacement; all N where there are no more.
        seed: of initial weights, dropout and batches; the caller's random state is left as it was.

    Raises:
        InputError: a kind that is not trained; fewer tokens than features; NaN or infinity in `x` or `y`.
        ValueError: shapes that differ; `steps` or `batch` below 1.
    """
    if kind not in _MODULES:
        raise InputError(f"map: {kind!r} is not trained, accepted are {', '.join(_MODULES)}")
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(f"x and y must both be (tokens, features), they are {tuple(x.shape)} and {tuple(y.shape)}")
    if steps < 1 or batch < 1:
        raise ValueError(f"steps={steps} and batch={batch} must be at least 1")
    tokens, width = x.shape
    if tokens < width:
        raise InputError(f"calibration_images: {tokens} tokens are fewer than the {width} features; give more images")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise InputError(f"non-finite activations: the tokens to train map {kind!r} on hold NaN or infinity")

    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(seed)
        module = _MODULES[kind](width).to(x.device).train()
        optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate)
        for chosen in _batches(tokens, min(batch, tokens), steps, x.device):
            loss = torch.nn.functional.mse_loss(module(x[chosen].float()), y[chosen].float())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return ModuleMap(module.eval().requires_grad_(False))


def _batches(tokens: int, batch: int, steps: int, device: torch.device) -> Iterator[Tensor]:
    """`steps` times the numbers of `batch` tokens; every token is drawn once before any is drawn again."""
    order, used = torch.randperm(tokens), 0
    for _ in range(steps):
        if used + batch > tokens:
            order, used = torch.randperm(tokens), 0
        yield order[used : used + batch].to(device)
        used += batch
