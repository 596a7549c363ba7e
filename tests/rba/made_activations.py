"""Activations without a network, and the plain formulas on them that the moments are compared with."""

import torch
from torch import Tensor

from hf_simprune.rba.activations import Activations


DEPTH, WIDTH, TOKENS = 4, 12, 7


def made_chunk(
    images: int, seed: int, depth: int = DEPTH, width: int = WIDTH, offset: float = 3.0, halves: bool = True
) -> Activations:
    """A residual stream of correlated features about means of size `offset`, written to by nonlinear halves."""
    weights = torch.Generator().manual_seed(0)
    draws = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=weights) / width**0.5
    h = torch.randn(images, TOKENS, width, generator=draws) @ mix + offset * torch.randn(width, generator=weights)
    hidden, parts = [h], {"an": [], "a": [], "mn": [], "m": []}
    for _ in range(depth):
        for norm, write in (("an", "a"), ("mn", "m")):
            first, second = torch.randn(2, width, width, generator=weights)
            x = torch.nn.functional.layer_norm(h, (width,)) + 0.1 * torch.randn(width, generator=weights)
            change = torch.tanh(x @ first) @ second / width + 0.05 * torch.randn(h.shape, generator=draws)
            parts[norm].append(x)
            parts[write].append(change)
            h = h + change
        hidden.append(h)
    return Activations(hidden, **parts) if halves else Activations(hidden)


def stored(chunks: list[Activations], name: str) -> Tensor:
    """All tokens (N, D) of a variable such as "h3", fp64."""
    return torch.cat([_values(chunk, name).flatten(0, 1) for chunk in chunks]).double()


def images_of(chunk: Activations, chosen: Tensor) -> Activations:
    """The chunk with the chosen images (boolean mask or numbers) alone."""
    lists = {name: [values[chosen] for values in getattr(chunk, name)] for name in ("hidden", "m", "an", "a", "mn")}
    return Activations(**lists)


def covariance(x: Tensor, y: Tensor) -> Tensor:
    """Centred, divided by the number of rows."""
    return (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)


def _values(chunk: Activations, name: str) -> Tensor:
    kind = name.rstrip("0123456789")
    entries = {"h": chunk.hidden, "m": chunk.m, "an": chunk.an, "a": chunk.a, "mn": chunk.mn}[kind]
    return entries[int(name[len(kind) :])]
