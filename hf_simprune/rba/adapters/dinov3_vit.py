# SPDX-License-Identifier: Apache-2.0
"""DINOv3 ViT: rotary positions on the patch tokens, registers, LayerScale. It has no classifier class."""

from typing import Any

from torch import Tensor, nn
from transformers import DINOv3ViTModel
from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb, eager_attention_forward

from .base import Adapter, attend_first


class DINOv3ViTAdapter(Adapter):
    """[`DINOv3ViTModel`]; the context of a forward pass is the cosine and sine of the rotary positions."""

    family = "dinov3_vit"
    model: DINOv3ViTModel
    classes = (DINOv3ViTModel,)

    @property
    def tower(self) -> Any:
        return self.model  # `base_model` would be the encoder, which is called "model" in this family

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.model.layer

    @property
    def num_prefix_tokens(self) -> int:
        return 1 + self.model.config.num_register_tokens

    @property
    def head(self) -> str:
        return "none"

    def embed(self, pixel_values: Tensor) -> tuple[Tensor, Any]:
        pixel_values = pixel_values.to(self.model.embeddings.patch_embeddings.weight.dtype)
        return self.model.embeddings(pixel_values), self.model.rope_embeddings(pixel_values)

    def block(self, b: int, h: Tensor, context: Any) -> Tensor:
        return self.layer(b)(h, position_embeddings=context)

    def attention_input(self, b: int, h: Tensor) -> Tensor:
        return self.layer(b).norm1(h)

    def attention_write(self, b: int, x: Tensor, context: Any, queries: int | None = None) -> Tensor:
        attention = self.layer(b).attention
        # The first tokens carry no rotary position, as long as they are prefix tokens.
        if queries is None or queries > self.num_prefix_tokens:
            update = attention(x, position_embeddings=context)[0][:, :queries]
        else:
            projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
            update = attend_first(
                attention,
                projections,
                x,
                queries,
                attention.scaling,
                eager_attention_forward,
                rotate_keys=lambda key: apply_rotary_pos_emb(key, key, *context)[1],
            )
        return self.layer(b).layer_scale1(update)

    def mlp_input(self, b: int, y: Tensor) -> Tensor:
        return self.layer(b).norm2(y)

    def mlp_write(self, b: int, x: Tensor) -> Tensor:
        return self.layer(b).layer_scale2(self.layer(b).mlp(x))

    def features(self, h: Tensor) -> Tensor:
        return self.model.norm(h[:, 0])

    def dense(self, h: Tensor) -> Tensor:
        return self.model.norm(h[:, self.num_prefix_tokens :])

    def output(self, h: Tensor) -> Tensor:
        return self.features(h)

    def mlp_output(self, b: int) -> nn.Linear:
        return self.layer(b).mlp.down_proj

    def mlp_scale(self, b: int) -> nn.Parameter | None:
        return self.layer(b).layer_scale2.lambda1
