# SPDX-License-Identifier: Apache-2.0
"""The token reduction that a run's options ask for, and the tokens that it leaves of every crop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .arguments import DinoArguments


if TYPE_CHECKING:  # --help must not wait for torch
    from ..reduction import ReductionSetting, TokenReducer


MIN_KEPT_PATCHES = 4
_FURTHER_SIZES = 64  # so many patches more a side are tried for a crop that would be large enough


@dataclass(frozen=True)
class Crops:
    """One kind of crop: its option, and its size and that of a patch in pixels a side."""

    option: str
    size: int
    patch_size: int

    @property
    def grid(self) -> tuple[int, int]:
        return (self.size // self.patch_size,) * 2


def chosen_options(args: DinoArguments) -> dict[str, Any]:
    """The method's options: `--reduction_options`, and `--matching` where the method has it.

    Raises:
        InputError: an option the method does not have, a value of another type, `matching` given as an option.
    """
    from ..reduction import METHODS, method_options, parse_options

    name = args.token_reduction
    try:
        options = parse_options(name, args.reduction_options)
    except InputError as error:
        raise InputError(f"--{_sentence(error)}") from None
    if "matching" in options:
        raise InputError(
            f"--reduction_options {args.reduction_options}: matching has an option of its own, --matching"
        )
    if name in METHODS and "matching" in method_options(name):
        options["matching"] = args.matching
    return options


def chosen_reducer(args: DinoArguments, setting: "ReductionSetting") -> "TokenReducer | None":
    """The reducer for networks and crops as in `setting`, None for dense training.

    Raises:
        InputError: what the method cannot do, with the options that ask for it.
    """
    from ..reduction import BranchReducer, build_reducer

    options = chosen_options(args)
    try:
        reducer = build_reducer(args.token_reduction, args.keep_rate, setting, options)
    except InputError as error:
        raise InputError(f"{_asked(args)}: {_sentence(error)}") from None
    if reducer is not None and args.reduction_layers is not None and reducer.layers != setting.layers:
        blocks = " ".join(map(str, args.reduction_layers))
        raise InputError(
            f"--reduction_layers {blocks}: {_asked(args)} has a schedule of its own; leave one of them out"
        )
    weighs_sizes = isinstance(reducer, BranchReducer) and reducer.weighs_sizes
    if weighs_sizes and (args.attn_implementation or "").startswith(("flash", "flex")):
        raise InputError(
            f"--attn_implementation {args.attn_implementation}: it cannot count a merged token by its size; use sdpa, "
            "or --reduction_options proportional=false"
        )
    return reducer


def check_epochs(args: DinoArguments) -> None:
    """For a stream whose length nobody knows: raise InputError when the method goes by epochs."""
    from ..reduction import METHODS

    name = args.token_reduction
    if name in METHODS and METHODS[name].counts_epochs:
        raise InputError(
            f"--token_reduction {name} measures anew every few epochs, and an epoch of this stream has no known "
            "length: train without --streaming, or choose another method"
        )


def without_effect(args: DinoArguments) -> list[str]:
    """One line for each option of a curriculum that was changed although the method has none."""
    from ..reduction import METHODS, method_options

    name = args.token_reduction
    if name in METHODS and "matching" in method_options(name):
        return []
    return [
        f"{option} {vars(args)[option]}: without effect, token reduction {name} has none"
        for option in ("curriculum", "matching")
        if vars(args)[option] != DinoArguments.__dataclass_fields__[option].default
    ]


def kept_patches(
    args: DinoArguments, reducer: "TokenReducer | None", setting: "ReductionSetting", crops: Sequence[Crops]
) -> list[tuple[int, ...]]:
    """For every kind of crop its patch tokens before the first stage and after each of them.

    Raises:
        InputError: crops that the method cannot reduce, or a stage that would keep fewer than `MIN_KEPT_PATCHES`.
    """
    import torch

    if reducer is None:
        return [(crop.grid[0] * crop.grid[1],) for crop in crops]
    found = []
    for crop in crops:
        try:
            counts = tuple(reducer.counts(crop.grid))
        except InputError as error:
            raise InputError(f"--{crop.option} {crop.size}: {_asked(args)}: {_sentence(error)}") from None
        if len(counts) > 1 and counts[-1] < MIN_KEPT_PATCHES:
            raise InputError(_too_few(args, setting, crop, counts, reducer.layers))
        found.append(counts)
    try:
        with torch.random.fork_rng(devices=[]):
            reducer.build_learned()
    except InputError as error:
        raise InputError(f"{_asked(args)}: {_sentence(error)}") from None
    return found


def keep_rate_counts(args: DinoArguments, setting: "ReductionSetting") -> bool:
    """Whether `--keep_rate` has a say in how many tokens stay: a method may have another schedule."""

    def counts(keep_rate: float) -> list[list[int]]:
        reducer = chosen_reducer(replace(args, keep_rate=keep_rate), setting)
        assert reducer is not None
        return [reducer.counts(grid) for grid in setting.grids]

    try:
        return counts(0.5) != counts(1.0)
    except InputError:  # what the method does depends on it
        return True


def _too_few(
    args: DinoArguments, setting: "ReductionSetting", crop: Crops, counts: tuple[int, ...], layers: Sequence[int]
) -> str:
    """Why a crop is refused, and the nearest size or keep rate that would do."""

    def enough(crop: Crops, keep_rate: float) -> bool:
        try:
            reducer = chosen_reducer(replace(args, keep_rate=keep_rate), replace(setting, grids=(crop.grid,)))
            assert reducer is not None
            return reducer.counts(crop.grid)[-1] >= MIN_KEPT_PATCHES
        except InputError:
            return False

    sizes = (crop.size + more * crop.patch_size for more in range(_FURTHER_SIZES))
    remedies = [
        _first(sizes, lambda size: enough(replace(crop, size=size), args.keep_rate), f"--{crop.option} "),
        # counts only grow with the rate, and 1.0 keeps everything
        _first((rate / 100 for rate in range(1, 101)), lambda rate: enough(crop, rate), "--keep_rate "),
    ]
    remedy = " or ".join(words for words in remedies if words)
    remedy = f"use {remedy} or more" if remedy else "use larger crops"
    remedy += ", or fewer --reduction_layers" if layers == setting.layers else ""
    kept, blocks = ", ".join(map(str, counts[1:])), ", ".join(map(str, layers))
    rate = f"at keep_rate {args.keep_rate:g}"
    if not keep_rate_counts(args, setting):
        rate = f"with --reduction_options {args.reduction_options}"
    return (
        f"--{crop.option} {crop.size} gives {counts[0]} patches, of which blocks {blocks} would keep {kept} {rate}; "
        f"at least {MIN_KEPT_PATCHES} must stay: {remedy}"
    )


def _first(values: Any, accept: Callable[[Any], bool], words: str) -> str | None:
    value = next((value for value in values if accept(value)), None)
    return None if value is None else f"{words}{value:g}"


def _asked(args: DinoArguments) -> str:
    options = f" --reduction_options {args.reduction_options}" if args.reduction_options else ""
    return f"--token_reduction {args.token_reduction} --keep_rate {args.keep_rate:g}{options}"


def _sentence(error: InputError) -> str:
    return str(error).rstrip(".")
