# SPDX-License-Identifier: Apache-2.0
"""The DeiT family: two prefix tokens (CLS, distillation)."""

from .configuration_simprune_deit import SimPruneDeiTConfig
from .modeling_simprune_deit import SimPruneDeiTForImageClassification, SimPruneDeiTModel


__all__ = ["SimPruneDeiTConfig", "SimPruneDeiTForImageClassification", "SimPruneDeiTModel"]
