# SPDX-License-Identifier: Apache-2.0
"""The way back: a trained backbone as an ordinary transformers model, for people without this package."""

from typing import Any

import torch
from torch import Tensor
from transformers import DeiTModel, Dinov2Model, PreTrainedConfig, ViTModel

from ..errors import InputError
from .deit import SimPruneDeiTModel
from .dinov2 import SimPruneDinov2Model
from .vit import SimPruneViTModel


def to_stock(model: SimPruneViTModel | SimPruneDeiTModel | SimPruneDinov2Model) -> ViTModel | DeiTModel | Dinov2Model:
    """A stock copy of `model`, in eval mode, on the same device and with the same precision.

    Its `pooler_output` is the CLS token of `last_hidden_state`; a ViT or DeiT carries a linear pooler with identity
    weight and zero bias for that, so that nothing is missing when the saved folder is loaded. Draws no random
    numbers. Raises `InputError` for anything but a backbone of this package, and for one that has maps in the place
    of blocks or token reduction.
    """
    if not isinstance(model, (SimPruneViTModel, SimPruneDeiTModel, SimPruneDinov2Model)):
        raise InputError(
            f"to_stock takes a SimPruneViTModel, SimPruneDeiTModel or SimPruneDinov2Model, got {type(model).__name__} "
            "(of a classifier, pass its backbone)"
        )
    if model.config.block_maps:
        raise InputError(
            f"to_stock: maps replace blocks {', '.join(model.config.block_maps)} of this model, which no stock class "
            "can hold; save it with hf_simprune.models.sharing.save_with_code"
        )
    try:
        config = model.config.to_stock()
    except ValueError as error:
        raise InputError(f"to_stock: {error}; save it with hf_simprune.models.sharing.save_with_code") from None
    weights = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("pooler.")}
    arguments = {}
    if not isinstance(model, SimPruneDinov2Model):  # which has no pooler, and its mask token in the configuration
        arguments["use_mask_token"] = model.embeddings.mask_token is not None
        add_cls_pooler(config, weights)
    # On the meta device, where nothing is drawn: a save must not change what the training draws next.
    stock_class: Any = model._stock_class  # whose configuration is of the same family
    with torch.device("meta"):
        stock = stock_class(config, **arguments)
    stock.load_state_dict(weights, strict=True, assign=True)
    return stock.eval()


def add_cls_pooler(config: PreTrainedConfig, weights: dict[str, Tensor]) -> None:
    """Give a backbone's configuration and weights a linear pooler that passes CLS on, both changed in place.

    The classes load a pooler, and would draw one at random for a folder that has none.
    """
    config.pooler_act = "linear"
    config.pooler_output_size = config.hidden_size
    like = weights["layernorm.weight"]
    weights["pooler.dense.weight"] = torch.eye(config.hidden_size, dtype=like.dtype, device=like.device)
    weights["pooler.dense.bias"] = torch.zeros_like(like)
