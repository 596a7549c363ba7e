# SPDX-License-Identifier: Apache-2.0
"""DINOv2, stock and this package's own whose blocks may already be maps, and DINOv2 with registers, stock only.

LayerScale after both halves, and a classifier on CLS and mean patch.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    PreTrainedModel,
)
from transformers.models.dinov2 import modeling_dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers

from .base import Adapter, attend_first, classifier_head


class Dinov2Adapter(Adapter):
    """[`Dinov2Model`] and [`Dinov2ForImageClassification`], with either of their two MLPs, and what is derived."""

    family = "dinov2"
    model: Any  # of one of these classes
    classes: ClassVar[tuple[type[PreTrainedModel], ...]] = (Dinov2Model, Dinov2ForImageClassification)
    # A block, its attention, its two kinds of MLP.
    parts: ClassVar[tuple[type, type, type, type]] = (
        modeling_dinov2.Dinov2Layer,
        modeling_dinov2.Dinov2Attention,
        modeling_dinov2.Dinov2MLP,
        modeling_dinov2.Dinov2SwiGLUFFN,
    )
    eager: ClassVar[Callable[..., Any]] = staticmethod(modeling_dinov2.eager_attention_forward)
    norms = {"attention": "norm1", "mlp": "norm2"}
    scales = {"attention": "layer_scale1", "mlp": "layer_scale2"}

    @property
    def tower(self) -> Any:
        return self.model.base_model

    @property
    def layers(self) -> nn.ModuleList:
        return self.tower.encoder.layer

    @property
    def num_prefix_tokens(self) -> int:
        return 1

    @property
    def head(self) -> str:
        return classifier_head(self.model, self.classes[1:])

    @property
    def output_tokens(self) -> int | None:
        # The classifier sees the mean patch token beside CLS, and without labels it passes both on as they are.
        return None if isinstance(self.model, self.classes[1:]) else self.num_prefix_tokens

    def is_block(self, b: int) -> bool:
        return isinstance(self.layer(b), self.parts[0])

    def halves(self, b: int) -> tuple[str, ...]:
        if not self.is_block(b):
            return ()
        _, attention, *mlps = self.parts
        found: dict[str, tuple[nn.Module, type | tuple[type, ...]]]
        found = {"attention": (self.layer(b).attention, attention), "mlp": (self.layer(b).mlp, tuple(mlps))}
        return tuple(half for half, (module, full) in found.items() if isinstance(module, full))

    def embed(self, pixel_values: Tensor) -> tuple[Tensor, Any]:
        return self.tower.embeddings(pixel_values), None

    def attention_input(self, b: int, h: Tensor) -> Tensor:
        return self.layer(b).norm1(h)

    def attention_write(self, b: int, x: Tensor, context: Any, queries: int | None = None) -> Tensor:
        attention = self.layer(b).attention
        if queries is None:
            update = attention(x)[0]
        elif "attention" not in self.halves(b):
            update = attention(x[:, :queries])[0]
        else:
            projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
            update = attend_first(attention, projections, x, queries, attention.scaling, self.eager)
        return self.layer(b).layer_scale1(update)

    def mlp_input(self, b: int, y: Tensor) -> Tensor:
        return self.layer(b).norm2(y)

    def mlp_write(self, b: int, x: Tensor) -> Tensor:
        return self.layer(b).layer_scale2(self.layer(b).mlp(x))

    def features(self, h: Tensor) -> Tensor:
        return self.tower.layernorm(h[:, 0])

    def dense(self, h: Tensor) -> Tensor:
        return self.tower.layernorm(h[:, self.num_prefix_tokens :])

    def output(self, h: Tensor) -> Tensor:
        if self.output_tokens is not None:
            return self.features(h)
        return self.model.classifier(torch.cat([self.features(h), self.dense(h).mean(dim=1)], dim=1))

    def mlp_output(self, b: int) -> nn.Linear:
        mlp = self.layer(b).mlp
        gated = isinstance(mlp, self.parts[3])
        return mlp.down_proj if gated else mlp.fc2

    def mlp_scale(self, b: int) -> nn.Parameter | None:
        return self.layer(b).layer_scale2.lambda1


class Dinov2WithRegistersAdapter(Dinov2Adapter):
    """The same with register tokens between CLS and the patch tokens."""

    family = "dinov2_with_registers"
    classes = (Dinov2WithRegistersModel, Dinov2WithRegistersForImageClassification)
    parts = (
        modeling_dinov2_with_registers.Dinov2WithRegistersLayer,
        modeling_dinov2_with_registers.Dinov2WithRegistersAttention,
        modeling_dinov2_with_registers.Dinov2WithRegistersMLP,
        modeling_dinov2_with_registers.Dinov2WithRegistersSwiGLUFFN,
    )
    eager = staticmethod(modeling_dinov2_with_registers.eager_attention_forward)

    @property
    def num_prefix_tokens(self) -> int:
        return 1 + self.tower.config.num_register_tokens
