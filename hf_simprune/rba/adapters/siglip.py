# SPDX-License-Identifier: Apache-2.0
"""SigLIP: its vision tower, alone, beside the text tower or under a classifier. It has no CLS token."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, SiglipForImageClassification, SiglipModel, SiglipVisionModel

from .base import Adapter, classifier_head, differs


class SiglipAdapter(Adapter):
    """The image embedding is what attention pooling makes of all tokens; without the pooling head, their mean."""

    family = "siglip"
    classes = (SiglipVisionModel, SiglipModel, SiglipForImageClassification)

    @property
    def tower(self) -> Any:
        return self.model if isinstance(self.model, SiglipVisionModel) else self.model.vision_model

    @property
    def layers(self) -> nn.ModuleList:
        return self.tower.encoder.layers

    @property
    def num_prefix_tokens(self) -> int:
        return 0

    @property
    def head(self) -> str:
        if isinstance(self.model, SiglipModel):
            return "projection"
        return classifier_head(self.model, (SiglipForImageClassification,))

    @property
    def output_tokens(self) -> int | None:
        return None

    def embed(self, pixel_values: Tensor) -> tuple[Tensor, Any]:
        interpolate = differs(pixel_values, self.image_size)
        return self.tower.embeddings(pixel_values, interpolate_pos_encoding=interpolate), None

    def attention_input(self, b: int, h: Tensor) -> Tensor:
        return self.layer(b).layer_norm1(h)

    def attention_write(self, b: int, x: Tensor, context: Any, queries: int | None = None) -> Tensor:
        return self.layer(b).self_attn(x)[0][:, :queries]

    def mlp_input(self, b: int, y: Tensor) -> Tensor:
        return self.layer(b).layer_norm2(y)

    def mlp_write(self, b: int, x: Tensor) -> Tensor:
        return self.layer(b).mlp(x)

    def features(self, h: Tensor) -> Tensor:
        tokens = self.tower.post_layernorm(h)
        return self.tower.head(tokens) if self.tower.use_head else tokens.mean(dim=1)

    def dense(self, h: Tensor) -> Tensor:
        return self.tower.post_layernorm(h)

    def output(self, h: Tensor) -> Tensor:
        if isinstance(self.model, SiglipForImageClassification):
            return self.model.classifier(self.tower.post_layernorm(h).mean(dim=1))
        return self.features(h)

    def blocks_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        alone = isinstance(self.model, SiglipVisionModel)
        return config if alone else config.vision_config

    def mlp_output(self, b: int) -> nn.Linear:
        return self.layer(b).mlp.fc2
