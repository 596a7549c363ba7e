# SPDX-License-Identifier: Apache-2.0
"""Plans that a stock model can say: removed blocks, and folds into the MLP before them."""

import copy
from dataclasses import fields

import torch
from torch import Tensor, nn
from transformers import DeiTModel, PreTrainedConfig, PreTrainedModel, ViTModel
from transformers.backbone_utils import BackboneConfigMixin

from ..errors import InputError
from ..models.stock import add_cls_pooler
from .adapters import Adapter, adapter_for
from .adapters.base import BOTH_HALVES
from .maps import AffineMap, FittedMaps
from .plan import CompressionPlan
from .replay import check_plan


def fits_stock(adapter: Adapter, plan: CompressionPlan) -> bool:
    """Whether a stock model can hold the plan's result: the plan puts no map in, and leaves none that was there.

    Raises `InputError` for a plan that is not for this model.
    """
    check_plan(adapter, plan)
    return not plan.needs_own_classes and all(adapter.halves(b) == BOTH_HALVES for b in kept_blocks(plan))


def kept_blocks(plan: CompressionPlan) -> list[int]:
    """The blocks that stay, in order."""
    removed = set(plan.removed_blocks)
    return [b for b in range(plan.depth) if b not in removed]


def convert_to_stock(model: PreTrainedModel, plan: CompressionPlan, maps: FittedMaps) -> PreTrainedModel:
    """A stock model of the same kind with the plan's spans removed and its folds absorbed, in eval mode.

    Everything but the blocks is as in `model`: heads, labels, text tower, precision, device; a bare ViT or DeiT
    without a pooler gets one that passes CLS on, so that nothing is missing when the saved folder is loaded. `model`
    stays as it is and no random number is drawn. `maps` holds the `AffineMap` of every fold. Raises `InputError` for
    a plan that a stock model cannot say (see `fits_stock`) or that is not for this model.
    """
    adapter = adapter_for(model)
    if not fits_stock(adapter, plan):
        raise InputError(
            f"plan: {plan}: the result holds maps, which no stock {adapter.family} has: use fold and identity only"
        )
    kept = kept_blocks(plan)
    stock = _without_blocks(adapter, kept)
    converted = adapter_for(stock)
    for span in plan.spans:
        if span.map == "fold":
            b = kept.index(span.start - 1)
            fold = maps[span]
            assert isinstance(fold, AffineMap)
            fold_into(converted.mlp_output(b), fold, converted.mlp_scale(b))
    return stock


@torch.no_grad()
def fold_into(linear: nn.Linear, fold: AffineMap, scale: nn.Parameter | None = None) -> None:
    """Change an MLP's last linear layer, in place, so that the MLP writes `M @ fold.weight + fold.bias` for M.

    `scale` is the LayerScale (D,) behind it: it moves into the layer and becomes 1. The arithmetic is fp64, the result
    of the layer's own precision. Raises `InputError` for a layer without bias and a fold with one.
    """

    def exact(value: Tensor) -> Tensor:
        return value.detach().cpu().double()  # not every accelerator has fp64

    matrix, offset = exact(fold.weight), exact(fold.bias)
    gain = torch.ones_like(offset) if scale is None else exact(scale)
    bias = torch.zeros_like(offset) if linear.bias is None else exact(linear.bias)
    bias = (gain * bias) @ matrix + offset
    if linear.bias is None and bias.any():
        raise InputError("bias=True: the MLPs of this model have no bias to fold one into, fit with bias=False")
    linear.weight.copy_(matrix.mT @ (gain[:, None] * exact(linear.weight)))
    if linear.bias is not None:
        linear.bias.copy_(bias)
    if scale is not None:
        scale.fill_(1.0)


def _without_blocks(adapter: Adapter, kept: list[int]) -> PreTrainedModel:
    """The stock model of the same kind with the blocks `kept` only."""
    model = adapter.model
    stock_class = next(base for base in type(model).__mro__ if base in adapter.classes)
    assert stock_class.config_class is not None
    config = _stock_config(model.config, stock_class.config_class)
    _set_depth(adapter.blocks_config(config), len(kept))
    weights = _kept_weights(adapter, kept)
    if stock_class in (ViTModel, DeiTModel) and adapter.tower.pooler is None:
        add_cls_pooler(config, weights)
    # On the meta device, where nothing is drawn and nothing is stored.
    with torch.device("meta"):
        stock = stock_class(config, **adapter.init_arguments())
    stock.load_state_dict(weights, strict=True, assign=True)
    for name, buffer in model.named_buffers():
        if name not in weights:  # tables that a checkpoint does not hold: positions, rotary frequencies
            parent, _, leaf = name.rpartition(".")
            stock.get_submodule(parent).register_buffer(leaf, buffer.clone(), persistent=False)
    return stock.eval()


def _stock_config(config: PreTrainedConfig, stock_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A copy of `config`, as the stock class if it is one that adds fields to it."""
    if type(config) is stock_class:
        return copy.deepcopy(config)
    added = {field.name for field in fields(type(config))} - {field.name for field in fields(stock_class)}
    added |= {"model_type", "auto_map", "architectures"}
    stock = stock_class.from_dict({key: value for key, value in config.to_dict().items() if key not in added})
    stock._attn_implementation = config._attn_implementation
    return stock


def _set_depth(config: PreTrainedConfig, depth: int) -> None:
    config.num_hidden_layers = depth
    if isinstance(config, BackboneConfigMixin):
        # The names of the stages follow the depth; left as they were, the saved configuration would not load.
        config.stage_names = ["stem", *(f"stage{index}" for index in range(1, depth + 1))]
        config.set_output_features_output_indices(out_features=None, out_indices=None)


def _kept_weights(adapter: Adapter, kept: list[int]) -> dict[str, Tensor]:
    """Copies of all weights under the names they have once only the blocks `kept` are there."""
    prefix = next(name for name, module in adapter.model.named_modules() if module is adapter.layers) + "."
    position = {str(b): index for index, b in enumerate(kept)}
    weights = {}
    for name, value in adapter.model.state_dict().items():
        if name.startswith(prefix):
            block, _, rest = name.removeprefix(prefix).partition(".")
            if block not in position:
                continue
            name = f"{prefix}{position[block]}.{rest}"
        weights[name] = value.clone()
    return weights
