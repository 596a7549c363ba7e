# SPDX-License-Identifier: Apache-2.0
"""The reducer that a model's configuration asks for, for methods that need no training."""

import inspect
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .base import BranchReducer, ReductionSetting, TokenReducer, default_reduction_layers, validate_reduction_layers


def reducer_of(
    config: Any, methods: Mapping[str, type[BranchReducer]], num_prefix: int, grid: tuple[int, int]
) -> BranchReducer | None:
    """What `config` says of token reduction, None where it says nothing.

    Args:
        config: a model configuration with the fields `token_reduction`, `keep_rate`, `reduction_layers`,
            `reduction_options`, `num_hidden_layers`, `hidden_size` and `num_attention_heads`.
        methods: those to choose from.
        num_prefix: prefix tokens of the network.
        grid: patches (rows, columns) of an image of the configured size.

    Raises:
        InputError: an unknown method or option, a value of another type or out of range, a layer that there is not,
            or settings without a method.
    """
    name, depth = config.token_reduction, config.num_hidden_layers
    choice = ", ".join(methods) or "none here, this copy of the code came with a model without token reduction"
    if name is None:
        for field, unset in (("keep_rate", 1), ("reduction_layers", None), ("reduction_options", None)):
            value = getattr(config, field)
            if value != unset and value != {}:
                raise InputError(f"{field} {value} without token_reduction: name a method ({choice}) or leave it out.")
        return None
    if name not in methods:
        raise InputError(f"token_reduction {name!r} is not for inference: choose one of {choice}.")
    options = config.reduction_options or {}
    check_options(name, methods[name], options)
    layers = config.reduction_layers
    layers = default_reduction_layers(depth) if layers is None else validate_reduction_layers(layers, depth)
    setting = ReductionSetting(
        layers, depth, config.hidden_size, config.num_attention_heads, num_prefix=num_prefix, grids=(grid,)
    )
    return methods[name](config.keep_rate, setting, **options)


def options_of(method: type[TokenReducer]) -> dict[str, inspect.Parameter]:
    """The options of a method: the keyword-only arguments of its `__init__`."""
    parameters = inspect.signature(method.__init__).parameters
    return {key: value for key, value in parameters.items() if value.kind is value.KEYWORD_ONLY}


def check_options(name: str, method: type[TokenReducer], options: Mapping[str, Any]) -> None:
    """Raise InputError for an option that the method called `name` does not have, or of another type than it says."""
    known = options_of(method)
    for option, value in options.items():
        if option not in known:
            accepted = ", ".join(known) or "it has none"
            raise InputError(f"reduction option {option} is unknown to {name}: {accepted}.")
        annotation = known[option].annotation
        kinds = getattr(annotation, "__args__", (annotation,))
        # True is an int and 1 is a good float, but neither the other way round.
        fits = type(value) in kinds or (type(value) is int and float in kinds)
        if not fits:
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise InputError(f"reduction option {option} {value!r} of {name} must be of type {names}.")
