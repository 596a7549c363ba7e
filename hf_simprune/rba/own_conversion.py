# SPDX-License-Identifier: Apache-2.0
"""Plans that no stock class can hold become models of this package, whose configuration says what is a map."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeiTForImageClassification,
    DeiTModel,
    Dinov2ForImageClassification,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
    ViTForImageClassification,
    ViTModel,
)

from ..errors import InputError
from ..models import (
    SimPruneDeiTForImageClassification,
    SimPruneDeiTModel,
    SimPruneDinov2ForImageClassification,
    SimPruneDinov2Model,
    SimPruneViTForImageClassification,
    SimPruneViTModel,
)
from ..models.stock import add_cls_pooler
from .adapters import Adapter, adapter_for
from .adapters.base import BOTH_HALVES
from .maps import AffineMap, ConstMap, FittedMap, FittedMaps, LowRankMap, ModuleMap
from .plan import STOCK_MAPS, CompressionPlan, Span
from .replay import check_plan
from .stock_conversion import fold_into


# The class of this package that a model with maps becomes.
OWN_CLASSES: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    ViTModel: SimPruneViTModel,
    ViTForImageClassification: SimPruneViTForImageClassification,
    DeiTModel: SimPruneDeiTModel,
    DeiTForImageClassification: SimPruneDeiTForImageClassification,
    Dinov2Model: SimPruneDinov2Model,
    Dinov2ForImageClassification: SimPruneDinov2ForImageClassification,
    SimPruneViTModel: SimPruneViTModel,
    SimPruneViTForImageClassification: SimPruneViTForImageClassification,
    SimPruneDeiTModel: SimPruneDeiTModel,
    SimPruneDeiTForImageClassification: SimPruneDeiTForImageClassification,
    SimPruneDinov2Model: SimPruneDinov2Model,
    SimPruneDinov2ForImageClassification: SimPruneDinov2ForImageClassification,
}
_WHOLE = {"kind": "block", "attention": "full", "mlp": "full"}

# A module of the result: the block it comes from, or the span that it stands for, and its entry in `block_maps`.
Place = tuple[int | Span, dict[str, Any] | None]


def convert_to_own(model: PreTrainedModel, plan: CompressionPlan, maps: FittedMaps) -> PreTrainedModel:
    """A copy of `model` of a class of this package, in eval mode, with what `plan` names replaced.

    Head, pooler, labels and precision are those of `model`, which stays as it is; its own maps, if it has any, are
    kept; a ViT or DeiT without a pooler gets one that passes CLS on, so that nothing is missing when the saved folder
    is loaded. Draws no random numbers.

    Args:
        model: a ViT, DeiT or DINOv2 backbone or image classifier in eval mode, stock or of this package.
        plan: for the blocks, maps included, that `model` has.
        maps: the fitted map of every span and half of the plan, fp32.

    Raises:
        InputError: another kind of model, a plan for another depth, a map that is missing or of another kind, a half
            or a fold where the model already has a map.
    """
    own_class = OWN_CLASSES.get(type(model))
    if own_class is None:
        taken = ", ".join(found.__name__ for found in OWN_CLASSES)
        raise InputError(
            f"plan {plan}: a {type(model).__name__} can have the maps {' and '.join(STOCK_MAPS)} only; "
            f"the others are for {taken}"
        )
    adapter = adapter_for(model)
    check_plan(adapter, plan)
    _check_maps(plan, maps)
    places = _places(plan, dict(vars(model.config).get("block_maps") or {}))
    config, weights = _config(model, own_class, places), _weights(adapter, plan, places, maps)
    if isinstance(model, (ViTModel, DeiTModel)) and model.pooler is None:
        add_cls_pooler(config, weights)
    # On the meta device nothing is drawn.
    with torch.device("meta"):
        result = own_class(config, **adapter.init_arguments())
    result.load_state_dict(weights, strict=True, assign=True)
    converted = adapter_for(result.eval())
    for span in plan.spans:
        if span.map == "fold":
            before = [origin for origin, _ in places].index(span.start - 1)
            fold = maps[span]
            assert isinstance(fold, AffineMap)
            fold_into(converted.mlp_output(before), fold, converted.mlp_scale(before))
    return result


def _check_maps(plan: CompressionPlan, maps: FittedMaps) -> None:
    kinds = {"linear": AffineMap, "fold": AffineMap, "low_rank": LowRankMap, "const": ConstMap}
    for item in plan.items:
        if item.map == "identity":
            continue
        expected = kinds.get(item.map, ModuleMap)
        if not isinstance(maps.get(item), expected):
            raise InputError(f"maps[{item}] = {type(maps.get(item)).__name__}: {expected.__name__} is needed")


def _places(plan: CompressionPlan, present: dict[str, dict[str, Any]]) -> list[Place]:
    """The modules of the result in order; `present` is the `block_maps` that the model already has."""
    spans = {block: span for span in plan.spans for block in range(span.start, span.end)}
    specs = {int(key): dict(spec) for key, spec in present.items()}
    for half in plan.halves:
        specs.setdefault(half.block, dict(_WHOLE))[half.half] = half.map
    places: list[Place] = []
    for block in range(plan.depth):
        span = spans.get(block)
        if span is None:
            places.append((block, specs.get(block)))
        elif block == span.start and span.map not in STOCK_MAPS:
            places.append((span, {"kind": span.map} if span.rank is None else {"kind": span.map, "rank": span.rank}))
    return places


def _config(model: PreTrainedModel, own_class: type[PreTrainedModel], places: list[Place]) -> PreTrainedConfig:
    values = model.config.to_dict()
    # The names of stages, which a stock DINOv2 has, follow its depth.
    for key in ("model_type", "architectures", "auto_map", "stage_names", "out_features", "out_indices"):
        values.pop(key, None)
    values["num_hidden_layers"] = len(places)
    values["block_maps"] = {str(index): spec for index, (_, spec) in enumerate(places) if spec is not None} or None
    assert own_class.config_class is not None
    config = own_class.config_class.from_dict(values)
    config._attn_implementation = model.config._attn_implementation  # not among the values
    return config


def _weights(adapter: Adapter, plan: CompressionPlan, places: list[Place], maps: FittedMaps) -> dict[str, Tensor]:
    """The state of the result, before folds: copies, those of the maps on the model's device and in its precision."""
    model = adapter.model
    layers = next(name for name, module in model.named_modules() if module is adapter.layers) + "."
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(layers)}
    halves = {(half.block, half.half): half for half in plan.halves}
    like = adapter.tower.layernorm.weight
    for index, (origin, _) in enumerate(places):
        if isinstance(origin, Span):
            found = {f"map.{name}": value.to(like) for name, value in _map_weights(maps[origin]).items()}
        else:
            found = adapter.layers[origin].state_dict()
            for name in BOTH_HALVES:
                half = halves.get((origin, name))
                if half is not None:
                    # A constant needs no norm, and a map is fitted to what the half writes behind its LayerScale.
                    gone = [name, adapter.scales.get(name)] + ([adapter.norms[name]] if half.map == "const" else [])
                    found = {key: value for key, value in found.items() if key.partition(".")[0] not in gone}
                    found.update({f"{name}.{key}": value.to(like) for key, value in _map_weights(maps[half]).items()})
        weights.update({f"{layers}{index}.{name}": value for name, value in found.items()})
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in weights.items()}


def _map_weights(fitted: FittedMap) -> dict[str, Tensor]:
    """The parameters of the module that computes a fitted map; weights of linear layers are (out, in)."""
    if isinstance(fitted, AffineMap):
        return {"dense.weight": fitted.weight.mT, "dense.bias": fitted.bias}
    if isinstance(fitted, LowRankMap):
        return {"down.weight": fitted.down.mT, "up.weight": fitted.up.mT, "up.bias": fitted.bias}
    if isinstance(fitted, ConstMap):
        return {"bias": fitted.bias}
    if isinstance(fitted, ModuleMap):
        return fitted.module.state_dict()
    raise TypeError(f"{type(fitted).__name__} has no parameters")
