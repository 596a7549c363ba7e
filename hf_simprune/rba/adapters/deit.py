# SPDX-License-Identifier: Apache-2.0
"""DeiT: the ViT's blocks with a distillation token, and a second classifier on it where there is one."""

from torch import Tensor
from transformers import DeiTForImageClassification, DeiTForImageClassificationWithTeacher, DeiTModel
from transformers.models.deit.modeling_deit import DeiTAttention, DeiTLayer, DeiTMLP

from .vit import ViTAdapter


class DeiTAdapter(ViTAdapter):
    """[`DeiTModel`] and its two classifiers, and what is derived from them."""

    family = "deit"
    classes = (DeiTModel, DeiTForImageClassification, DeiTForImageClassificationWithTeacher)
    parts = (DeiTLayer, DeiTAttention, DeiTMLP)

    def output(self, h: Tensor) -> Tensor:
        if self.head == "classifier" and isinstance(self.model, DeiTForImageClassificationWithTeacher):
            cls, distillation = self.tower.layernorm(h[:, :2]).unbind(1)
            return (self.model.cls_classifier(cls) + self.model.distillation_classifier(distillation)) / 2
        return super().output(h)
