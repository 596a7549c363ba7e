# SPDX-License-Identifier: Apache-2.0
"""The way back: a trained backbone as an ordinary transformers model, for people without this package."""

import torch
from transformers import DeiTModel, ViTModel

from ..errors import InputError
from .deit import SimPruneDeiTModel
from .vit import SimPruneViTModel


def to_stock(model: SimPruneViTModel | SimPruneDeiTModel) -> ViTModel | DeiTModel:
    """A stock copy of `model`, in eval mode, on the same device and with the same precision.

    It carries a linear pooler with identity weight and zero bias, so that nothing is missing when the saved folder is
    loaded, and `pooler_output` is the CLS token of `last_hidden_state`. Draws no random numbers. Raises `InputError`
    for anything but a backbone of this package.
    """
    if not isinstance(model, (SimPruneViTModel, SimPruneDeiTModel)):
        raise InputError(
            f"to_stock takes a SimPruneViTModel or SimPruneDeiTModel, got {type(model).__name__} "
            "(of a classifier, pass its backbone)"
        )
    config = model.config.to_stock()
    config.pooler_act = "linear"
    config.pooler_output_size = config.hidden_size
    has_mask_token = model.embeddings.mask_token is not None
    # On the meta device, where nothing is drawn: a save must not change what the training draws next.
    with torch.device("meta"):
        stock = model._stock_class(config, use_mask_token=has_mask_token)
    weights = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("pooler.")}
    like = weights["layernorm.weight"]
    weights["pooler.dense.weight"] = torch.eye(config.hidden_size, dtype=like.dtype, device=like.device)
    weights["pooler.dense.bias"] = torch.zeros_like(like)
    stock.load_state_dict(weights, strict=True, assign=True)
    return stock.eval()
