# SPDX-License-Identifier: Apache-2.0
"""Every method by its name, its options, and how one is built. A new method is one file and one line in `METHODS`."""

import inspect
from typing import Any

from ..errors import InputError
from .base import BranchReducer, ReductionSetting, TokenReducer, validate_keep_rate
from .evit import EViTReducer
from .expedit import ExpeditReducer
from .inference import check_options, options_of
from .mctf import MCTFReducer
from .patch_slimming import PatchSlimmingReducer
from .random import RandomReducer
from .self_slimmed import SelfSlimmedReducer
from .simprune import SimPruneReducer
from .simprune_dynamic import SimPruneDynamicReducer
from .tome import ToMeReducer


METHODS: dict[str, type[TokenReducer]] = {
    "random": RandomReducer,
    "simprune": SimPruneReducer,
    "simprune_dynamic": SimPruneDynamicReducer,
    "evit": EViTReducer,
    "tome": ToMeReducer,
    "mctf": MCTFReducer,
    "expedit": ExpeditReducer,
    "patch_slimming": PatchSlimmingReducer,
    "self_slimmed": SelfSlimmedReducer,
}
REDUCTIONS = ("none", *METHODS)
# Those that need no training and so also work at inference, on any checkpoint.
INFERENCE_METHODS: dict[str, type[BranchReducer]] = {
    "evit": EViTReducer,
    "expedit": ExpeditReducer,
    "mctf": MCTFReducer,
    "tome": ToMeReducer,
}


def build_reducer(
    name: str,
    keep_rate: float,
    setting: ReductionSetting = ReductionSetting(),
    options: dict[str, Any] | None = None,
) -> TokenReducer | None:
    """The reducer called `name`, None for "none".

    Raises InputError for an unknown name or option, a keep rate outside (0, 1], or what the method cannot do.
    """
    check_reduction(name)
    validate_keep_rate(keep_rate)
    if name == "none":
        if options:
            raise InputError(f"reduction option {next(iter(options))}: without token reduction there is none.")
        return None
    check_options(name, METHODS[name], options or {})
    return METHODS[name](keep_rate, setting, **(options or {}))


def check_reduction(name: str) -> None:
    """Raise InputError unless `name` is one of REDUCTIONS."""
    if name not in REDUCTIONS:
        raise InputError(f"token_reduction {name!r} is unknown: choose one of {', '.join(REDUCTIONS)}.")


def method_options(name: str) -> dict[str, inspect.Parameter]:
    """The options of the method called `name`: the keyword-only arguments of its `__init__`."""
    return options_of(METHODS[name])


def parse_options(name: str, text: str | None) -> dict[str, Any]:
    """`"fuse=false,r=8"` as typed values of the method's options; None gives an empty dictionary.

    Raises InputError for an option the method does not have, or a value of another type.
    """
    values: dict[str, Any] = {}
    known = method_options(name) if name in METHODS else {}
    text = text or ""
    for entry in text.split(",") if text else []:
        key, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not value:
            raise InputError(f"reduction_options {text}: {entry!r} is not of the form name=value.")
        if key not in known:
            accepted = ", ".join(known) or "it has none"
            raise InputError(f"reduction_options {text}: {name} has no option {key}: {accepted}.")
        if key in values:
            raise InputError(f"reduction_options {text}: {key} is given twice.")
        values[key] = _typed(text, key, value, known[key].annotation)
    return values


def _typed(text: str, key: str, value: str, annotation: Any) -> bool | int | float | str | None:
    """`value` as the first type of the annotation, such as `int | None`, that takes it."""
    kinds = getattr(annotation, "__args__", (annotation,))
    for kind in kinds:
        try:
            return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, TypeError, ValueError):
            continue
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    expected = " or ".join(names[kind] for kind in kinds if kind in names)
    raise InputError(f"reduction_options {text}: {key} must be {expected}, got {value}.")
