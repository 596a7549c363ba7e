# SPDX-License-Identifier: Apache-2.0
"""The DINOv2 family: one prefix token (CLS), LayerScale, a mask token, no pooler."""

from .configuration_simprune_dinov2 import SimPruneDinov2Config
from .modeling_simprune_dinov2 import SimPruneDinov2ForImageClassification, SimPruneDinov2Model


__all__ = ["SimPruneDinov2Config", "SimPruneDinov2ForImageClassification", "SimPruneDinov2Model"]
