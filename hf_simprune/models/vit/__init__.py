# SPDX-License-Identifier: Apache-2.0
"""The ViT family: one prefix token (CLS)."""

from .configuration_simprune_vit import SimPruneViTConfig
from .modeling_simprune_vit import SimPruneViTForImageClassification, SimPruneViTModel


__all__ = ["SimPruneViTConfig", "SimPruneViTForImageClassification", "SimPruneViTModel"]
