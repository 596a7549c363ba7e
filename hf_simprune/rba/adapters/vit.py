# SPDX-License-Identifier: Apache-2.0
"""ViT: stock, and this package's own, whose blocks may already be maps."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel, ViTForImageClassification, ViTModel
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, ViTMLP, eager_attention_forward

from .base import Adapter, attend_first, classifier_head, differs


class ViTAdapter(Adapter):
    """[`ViTModel`] and [`ViTForImageClassification`], and what is derived from them."""

    family = "vit"
    model: Any  # of one of these classes
    classes: ClassVar[tuple[type[PreTrainedModel], ...]] = (ViTModel, ViTForImageClassification)
    parts: ClassVar[tuple[type, type, type]] = (ViTLayer, ViTAttention, ViTMLP)  # a block, its halves in full
    norms = {"attention": "layernorm_before", "mlp": "layernorm_after"}

    @property
    def tower(self) -> Any:
        return self.model.base_model

    @property
    def layers(self) -> nn.ModuleList:
        return self.tower.layers

    @property
    def num_prefix_tokens(self) -> int:
        embeddings = self.tower.embeddings
        return embeddings.position_embeddings.shape[1] - embeddings.patch_embeddings.num_patches

    @property
    def head(self) -> str:
        return classifier_head(self.model, self.classes[1:])

    def is_block(self, b: int) -> bool:
        return isinstance(self.layer(b), self.parts[0])

    def halves(self, b: int) -> tuple[str, ...]:
        if not self.is_block(b):
            return ()
        _, attention, mlp = self.parts
        found = {"attention": (self.layer(b).attention, attention), "mlp": (self.layer(b).mlp, mlp)}
        return tuple(half for half, (module, full) in found.items() if isinstance(module, full))

    def embed(self, pixel_values: Tensor) -> tuple[Tensor, Any]:
        pixel_values = pixel_values.to(self.tower.embeddings.patch_embeddings.projection.weight.dtype)
        interpolate = differs(pixel_values, self.image_size)
        return self.tower.embeddings(pixel_values, interpolate_pos_encoding=interpolate), None

    def attention_input(self, b: int, h: Tensor) -> Tensor:
        return self.layer(b).layernorm_before(h)

    def attention_write(self, b: int, x: Tensor, context: Any, queries: int | None = None) -> Tensor:
        attention = self.layer(b).attention
        if queries is None:
            return attention(x, None)[0]
        if "attention" not in self.halves(b):
            return attention(x[:, :queries], None)[0]
        projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        return attend_first(attention, projections, x, queries, attention.scaling, eager_attention_forward)

    def mlp_input(self, b: int, y: Tensor) -> Tensor:
        return self.layer(b).layernorm_after(y)

    def mlp_write(self, b: int, x: Tensor) -> Tensor:
        return self.layer(b).mlp(x)

    def features(self, h: Tensor) -> Tensor:
        return self.tower.layernorm(h[:, 0])

    def dense(self, h: Tensor) -> Tensor:
        return self.tower.layernorm(h[:, self.num_prefix_tokens :])

    def output(self, h: Tensor) -> Tensor:
        feature = self.features(h)
        return self.model.classifier(feature) if self.head == "classifier" else feature

    def init_arguments(self) -> dict[str, Any]:
        if self.tower is not self.model:
            return {}
        return {"add_pooling_layer": True, "use_mask_token": self.tower.embeddings.mask_token is not None}

    def mlp_output(self, b: int) -> nn.Linear:
        return self.layer(b).mlp.fc2
