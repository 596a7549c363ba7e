# SPDX-License-Identifier: Apache-2.0
"""The way back: a trained backbone as an ordinary transformers model, for people without this package."""

import torch
from torch import Tensor
from transformers import DeiTModel, PreTrainedConfig, ViTModel

from ..errors import InputError
from .deit import SimPruneDeiTModel
from .vit import SimPruneViTModel


def to_stock(model: SimPruneViTModel | SimPruneDeiTModel) -> ViTModel | DeiTModel:
    """A stock copy of `model`, in eval mode, on the same device and with the same precision.

    It carries a linear pooler with identity weight and zero bias, so that nothing is missing when the saved folder is
    loaded, and `pooler_output` is the CLS token of `last_hidden_state`. Draws no random numbers. Raises `InputError`
    for anything but a backbone of this package, and for one that has maps in the place of blocks.
    """
    if not isinstance(model, (SimPruneViTModel, SimPruneDeiTModel)):
        raise InputError(
            f"to_stock takes a SimPruneViTModel or SimPruneDeiTModel, got {type(model).__name__} "
            "(of a classifier, pass its backbone)"
        )
    if model.config.block_maps:
        raise InputError(
            f"to_stock: maps replace blocks {', '.join(model.config.block_maps)} of this model, which no stock class "
            "can hold; save it with hf_simprune.models.sharing.save_with_code"
        )
    config = model.config.to_stock()
    has_mask_token = model.embeddings.mask_token is not None
    weights = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("pooler.")}
    add_cls_pooler(config, weights)
    # On the meta device, where nothing is drawn: a save must not change what the training draws next.
    with torch.device("meta"):
        stock = model._stock_class(config, use_mask_token=has_mask_token)
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
