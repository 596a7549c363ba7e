# SPDX-License-Identifier: Apache-2.0
"""CLIP: its vision tower, alone, with the projection, beside the text tower or under a classifier."""

from typing import Any

from torch import Tensor, nn
from transformers import (
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
)
from transformers.models.clip.modeling_clip import eager_attention_forward

from .base import Adapter, attend_first, classifier_head, differs


class CLIPAdapter(Adapter):
    """The text tower is never touched; `output` of a model with a projection is the projected image embedding."""

    family = "clip"
    model: Any  # of one of these classes
    classes = (CLIPVisionModel, CLIPVisionModelWithProjection, CLIPModel, CLIPForImageClassification)

    @property
    def tower(self) -> Any:
        return self.model if isinstance(self.model, CLIPVisionModel) else self.model.vision_model

    @property
    def layers(self) -> nn.ModuleList:
        return self.tower.encoder.layers

    @property
    def num_prefix_tokens(self) -> int:
        return 1

    @property
    def head(self) -> str:
        if isinstance(self.model, (CLIPModel, CLIPVisionModelWithProjection)):
            return "projection"
        return classifier_head(self.model, (CLIPForImageClassification,))

    @property
    def output_tokens(self) -> int | None:
        return None if isinstance(self.model, CLIPForImageClassification) else 1

    def embed(self, pixel_values: Tensor) -> tuple[Tensor, Any]:
        interpolate = differs(pixel_values, self.image_size)
        embeddings = self.tower.embeddings(pixel_values, interpolate_pos_encoding=interpolate)
        return self.tower.pre_layrnorm(embeddings), None

    def attention_input(self, b: int, h: Tensor) -> Tensor:
        return self.layer(b).layer_norm1(h)

    def attention_write(self, b: int, x: Tensor, context: Any, queries: int | None = None) -> Tensor:
        attention = self.layer(b).self_attn
        if queries is None:
            return attention(x)[0]
        projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj
        return attend_first(attention, projections, x, queries, attention.scale, eager_attention_forward)

    def mlp_input(self, b: int, y: Tensor) -> Tensor:
        return self.layer(b).layer_norm2(y)

    def mlp_write(self, b: int, x: Tensor) -> Tensor:
        return self.layer(b).mlp(x)

    def features(self, h: Tensor) -> Tensor:
        return self.tower.post_layernorm(h[:, 0])

    def dense(self, h: Tensor) -> Tensor:
        return self.tower.post_layernorm(h[:, 1:])

    def output(self, h: Tensor) -> Tensor:
        if isinstance(self.model, CLIPForImageClassification):
            return self.model.classifier(h[:, 1:].mean(dim=1))  # of patch tokens before the norm, as in transformers
        feature = self.features(h)
        return self.model.visual_projection(feature) if self.head == "projection" else feature

    def blocks_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        alone = isinstance(self.model, (CLIPVisionModel, CLIPVisionModelWithProjection))
        return config if alone else config.vision_config

    def mlp_output(self, b: int) -> nn.Linear:
        return self.layer(b).mlp.fc2
