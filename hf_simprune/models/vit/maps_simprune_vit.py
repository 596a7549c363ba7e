# SPDX-License-Identifier: Apache-2.0
"""What stands in for a block, or for half of one, of the SimPrune ViT: maps fitted to what was there."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


class LinearMap(nn.Module):
    """Tokens (..., D) to x W^T + b."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dense(hidden_states)


class LowRankMap(nn.Module):
    """Tokens (..., D) plus an affine change of them of rank `rank`."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.up(self.down(hidden_states))


class MLPMap(nn.Module):
    """The two-layer translator of TOAST (arXiv 2410.04941): D to D/2, GELU, D/2 to D, without a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width // 2)
        self.fc2 = nn.Linear(width // 2, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(hidden_states)))


class ResMLPMap(nn.Module):
    """The deep translator of TOAST (arXiv 2410.04941): norm, a SiLU feed-forward with residual, norm."""

    def __init__(self, width: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.norm_before = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(width, width)
        self.norm_after = nn.LayerNorm(width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        update = nn.functional.silu(self.fc1(self.norm_before(hidden_states)))
        return self.norm_after(hidden_states + self.fc2(self.dropout(update)))


class ConstMap(nn.Module):
    """The same vector for every token (..., D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.bias.expand_as(hidden_states)


class LinearAttention(LinearMap):
    """A linear map of each token where attention was; there are no attention weights."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return super().forward(hidden_states), None


class ConstAttention(ConstMap):
    """The same vector for every token where attention was; there are no attention weights."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return super().forward(hidden_states), None


class SimPruneViTMapLayer(GradientCheckpointingLayer):
    """One map in the place of one or more consecutive blocks; tokens (B, T, D) to (B, T, D), each for itself.

    `spec` is the entry of `block_maps` in the configuration, of any kind but "block".
    """

    def __init__(self, width: int, spec: dict[str, Any]) -> None:
        super().__init__()
        kind = spec["kind"]
        self.map = LowRankMap(width, spec["rank"]) if kind == "low_rank" else BLOCK_MAPS[kind](width)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        half: str | None = None,
        num_queries: int | None = None,
        reduction: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        if half is not None or num_queries is not None:
            raise ValueError("a replaced block has no halves: call it without half and num_queries")
        if reduction is not None:
            raise ValueError("a replaced block has no halves: tokens cannot be reduced there")
        return self.map(hidden_states)


BLOCK_MAPS: dict[str, type[nn.Module]] = {
    "linear": LinearMap,
    "low_rank": LowRankMap,
    "mlp": MLPMap,
    "res_mlp": ResMLPMap,
}
_ATTENTION_MAPS = {"linear": LinearAttention, "const": ConstAttention}
_MLP_MAPS = {"linear": LinearMap, "const": ConstMap}


def replace_halves(layer: nn.Module, width: int, spec: dict[str, Any]) -> None:
    """Put maps where `spec`, an entry of `block_maps` of kind "block", says so; what is constant needs no norm."""
    if spec["attention"] != "full":
        layer.attention = _ATTENTION_MAPS[spec["attention"]](width)
    if spec["mlp"] != "full":
        layer.mlp = _MLP_MAPS[spec["mlp"]](width)
    if spec["attention"] == "const":
        layer.layernorm_before = nn.Identity()
    if spec["mlp"] == "const":
        layer.layernorm_after = nn.Identity()


__all__ = ["LinearMap", "LowRankMap", "MLPMap", "ResMLPMap", "SimPruneViTMapLayer"]
