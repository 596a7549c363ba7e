# SPDX-License-Identifier: Apache-2.0
"""The projection head of DINO (https://huggingface.co/papers/2104.14294)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from .prototypes import scaled_linear


class DinoHead(nn.Module):
    """Three-layer MLP, L2 normalisation, then a weight-normalised layer without bias (the prototypes).

    Args:
        in_dim (`int`): width D of the backbone.
        out_dim (`int`): number of prototypes K.
        hidden_dim (`int`, *optional*, defaults to 2048): width of the two hidden layers.
        bottleneck_dim (`int`, *optional*, defaults to 256): width of the normalised embedding.
        norm_last_layer (`bool`, *optional*, defaults to `True`): keep the prototypes' lengths fixed at 1. DINO fixes
            them for large models and trains them for small ones.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
        lengths = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(lengths)
        lengths.requires_grad_(not norm_last_layer)

    def forward(self, cls_tokens: Tensor) -> Tensor:
        """(B, D) CLS features -> (B, K) logits, not yet divided by a temperature."""
        embedding = self.mlp(cls_tokens)
        # fp16 cannot hold the default 1e-12
        embedding = F.normalize(embedding, dim=-1, eps=1e-6 if embedding.dtype == torch.float16 else 1e-12)
        weight = self.last_layer.parametrizations.weight
        return scaled_linear(embedding, directions=weight.original1, lengths=weight.original0)
