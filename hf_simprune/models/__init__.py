# SPDX-License-Identifier: Apache-2.0
"""What `from_pretrained` returns, one folder a family; importing this registers the families with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .deit import SimPruneDeiTConfig, SimPruneDeiTForImageClassification, SimPruneDeiTModel
from .dinov2 import SimPruneDinov2Config, SimPruneDinov2ForImageClassification, SimPruneDinov2Model
from .vit import SimPruneViTConfig, SimPruneViTForImageClassification, SimPruneViTModel


for _config, _model, _classifier in (
    (SimPruneViTConfig, SimPruneViTModel, SimPruneViTForImageClassification),
    (SimPruneDeiTConfig, SimPruneDeiTModel, SimPruneDeiTForImageClassification),
    (SimPruneDinov2Config, SimPruneDinov2Model, SimPruneDinov2ForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageClassification.register(_config, _classifier, exist_ok=True)

__all__ = [
    "SimPruneDeiTConfig",
    "SimPruneDeiTForImageClassification",
    "SimPruneDeiTModel",
    "SimPruneDinov2Config",
    "SimPruneDinov2ForImageClassification",
    "SimPruneDinov2Model",
    "SimPruneViTConfig",
    "SimPruneViTForImageClassification",
    "SimPruneViTModel",
]
