# SPDX-License-Identifier: Apache-2.0
"""One small file a family: how its models are opened for analysis and conversion."""

from transformers import PreTrainedModel

from ...errors import InputError
from ...models import SimPruneDeiTConfig, SimPruneDinov2Config, SimPruneViTConfig
from .base import Adapter, module_forward
from .clip import CLIPAdapter
from .deit import DeiTAdapter
from .dinov2 import Dinov2Adapter, Dinov2WithRegistersAdapter
from .dinov3_vit import DINOv3ViTAdapter
from .siglip import SiglipAdapter
from .vit import ViTAdapter


OWN_CONFIGS = (SimPruneViTConfig, SimPruneDeiTConfig, SimPruneDinov2Config)
ADAPTERS: tuple[type[Adapter], ...] = (
    ViTAdapter,
    DeiTAdapter,
    Dinov2Adapter,
    Dinov2WithRegistersAdapter,
    DINOv3ViTAdapter,
    CLIPAdapter,
    SiglipAdapter,
)


def adapter_for(model: PreTrainedModel) -> Adapter:
    """The adapter of the model's family. Raises `InputError` for a family or a kind of model that has none."""
    if isinstance(model.config, OWN_CONFIGS) and model.config.token_reduction is not None:
        raise InputError(
            f"model reduces tokens (token_reduction {model.config.token_reduction}): its blocks see ever fewer, "
            "and no map fits; take the model without token_reduction and set it on the result"
        )
    for adapter in ADAPTERS:
        if isinstance(model, adapter.classes):
            return adapter(model)
    supported = ", ".join(kind.__name__ for adapter in ADAPTERS for kind in adapter.classes)
    raise InputError(f"model is a {type(model).__name__}, which is not supported: take one of {supported}")


__all__ = ["Adapter", "adapter_for", "module_forward"]
