# SPDX-License-Identifier: Apache-2.0
"""Sizes that follow from the options and the network: crops, patches, depth, and the tokens each stage keeps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .arguments import DinoArguments


DEFAULT_ARCHITECTURE = "vit_small"
DEFAULT_IMAGE_SIZE = 224
LOCAL_CROP_RATIO = 96 / 224
MIN_KEPT_PATCHES = 4
OWN_MODEL_TYPES = ("simprune_vit", "simprune_deit")
MODEL_TYPES = ("vit", "deit", *OWN_MODEL_TYPES)
OVERRIDE_KINDS: dict[str, type] = {
    "hidden_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "intermediate_size": int,
    "hidden_act": str,
    "hidden_dropout_prob": float,
    "attention_probs_dropout_prob": float,
    "initializer_range": float,
    "layer_norm_eps": float,
    "qkv_bias": bool,
}


@dataclass(frozen=True)
class Geometry:
    """Sizes in pixels a side; `reduction_layers` ascending, empty for dense training.

    global_counts, local_counts: patch tokens before the first stage and after each of them; no local ones: empty.
    """

    name: str
    depth: int
    image_size: int
    patch_size: int
    global_crop_size: int
    local_crop_size: int
    reduction_layers: tuple[int, ...]
    global_counts: tuple[int, ...]
    local_counts: tuple[int, ...]


def geometry(args: DinoArguments) -> Geometry:
    """The sizes of a run. Reads at most a model's configuration, no weights and no data.

    Raises:
        InputError: unknown architecture or checkpoint, a crop size that is no multiple of the patch size, a reduction
            layer out of range or named twice, a stage that would keep fewer than 4 patches of a crop.
    """
    from ..reduction import default_reduction_layers, validate_reduction_layers

    if args.model_name_or_path is not None:
        name, depth, image_size, patch_size = _checkpoint_sizes(args)
    else:
        name, depth, image_size, patch_size = _architecture_sizes(args)
    global_size = args.global_crop_size or image_size
    local_size = args.local_crop_size or default_local_crop_size(global_size, patch_size)
    _check_multiple("image_size", image_size, patch_size)
    _check_multiple("global_crop_size", global_size, patch_size)
    layers: tuple[int, ...] = ()
    if args.token_reduction != "none":
        given = args.reduction_layers
        layers = default_reduction_layers(depth) if given is None else validate_reduction_layers(given, depth)
    local_counts: tuple[int, ...] = ()
    if args.local_crops_number > 0:
        _check_multiple("local_crop_size", local_size, patch_size)
        local_counts = _kept_patches("local_crop_size", local_size, patch_size, args.keep_rate, layers)
    global_counts = _kept_patches("global_crop_size", global_size, patch_size, args.keep_rate, layers)
    return Geometry(
        name=name,
        depth=depth,
        image_size=image_size,
        patch_size=patch_size,
        global_crop_size=global_size,
        local_crop_size=local_size,
        reduction_layers=layers,
        global_counts=global_counts,
        local_counts=local_counts,
    )


def default_local_crop_size(global_crop_size: int, patch_size: int) -> int:
    """The published proportion, 96 of 224 pixels, as the nearest multiple of the patch size."""
    return max(1, round(global_crop_size * LOCAL_CROP_RATIO / patch_size)) * patch_size


def parse_config_overrides(text: str | None) -> dict[str, Any]:
    """`"num_hidden_layers=4,qkv_bias=false"` as a dictionary of typed values; `None` gives an empty one.

    Raises:
        InputError: a setting that is not in `OVERRIDE_KINDS`, or a value that is not of its type.
    """
    overrides: dict[str, Any] = {}
    for entry in text.split(",") if text else []:
        key, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not value:
            raise InputError(f"--config_overrides {text}: {entry!r} is not of the form name=value")
        if key in ("image_size", "patch_size", "drop_path_rate"):
            raise InputError(f"--config_overrides {text}: {key} has an option of its own, --{key}")
        if key not in OVERRIDE_KINDS:
            raise InputError(f"--config_overrides {text}: unknown setting {key}; known: {', '.join(OVERRIDE_KINDS)}")
        if key in overrides:
            raise InputError(f"--config_overrides {text}: {key} is given twice")
        kind = OVERRIDE_KINDS[key]
        try:
            overrides[key] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
            raise InputError(f"--config_overrides {text}: {key} must be {expected}, got {value}") from None
        if kind is int and overrides[key] < 1:
            raise InputError(f"--config_overrides {text}: {key} must be at least 1")
        if kind is float and not 0 <= overrides[key] < 1:
            raise InputError(f"--config_overrides {text}: {key} must be from 0 up to, not including, 1")
    return overrides


def _architecture_sizes(args: DinoArguments) -> tuple[str, int, int, int]:
    from transformers.activations import ACT2FN

    from ..models.architectures import ARCHITECTURES

    name = args.architecture or DEFAULT_ARCHITECTURE
    if name not in ARCHITECTURES:
        raise InputError(f"--architecture {name} is unknown: choose one of {', '.join(ARCHITECTURES)}")
    sizes = {**ARCHITECTURES[name], **parse_config_overrides(args.config_overrides)}
    if sizes.get("hidden_act", "gelu") not in ACT2FN:
        raise InputError(f"--config_overrides: hidden_act {sizes['hidden_act']} is unknown; use gelu, relu or silu")
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if width % heads:
        raise InputError(f"--config_overrides: hidden_size {width} is no multiple of num_attention_heads {heads}")
    return (
        name,
        sizes["num_hidden_layers"],
        args.image_size or DEFAULT_IMAGE_SIZE,
        args.patch_size or sizes["patch_size"],
    )


def _checkpoint_sizes(args: DinoArguments) -> tuple[str, int, int, int]:
    from transformers import AutoConfig

    from .. import models  # noqa: F401  registers the model types

    name = args.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(
            name, revision=args.model_revision, token=args.token, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"--model_name_or_path {name}: no model there: {str(error).strip().splitlines()[0]}"
        ) from None
    if config.model_type not in MODEL_TYPES:
        raise InputError(
            f"--model_name_or_path {name}: a {config.model_type} model; DINO starts from {', '.join(MODEL_TYPES)}"
        )
    if config.model_type in OWN_MODEL_TYPES and config.block_maps:
        raise InputError(
            f"--model_name_or_path {name}: maps replace its blocks {', '.join(config.block_maps)}; DINO starts from "
            "models whose blocks are all there: give the model it was made from"
        )
    for option in ("image_size", "patch_size"):
        if not isinstance(getattr(config, option), int):
            raise InputError(f"--model_name_or_path {name}: its {option} is not square, which is not supported")
    if args.patch_size not in (None, config.patch_size):
        raise InputError(
            f"--patch_size {args.patch_size}: the patches of {name} have {config.patch_size} pixels a side"
        )
    if args.image_size not in (None, config.image_size):
        raise InputError(
            f"--image_size {args.image_size}: {name} was made for {config.image_size} pixels; leave it out and choose "
            "crops with --global_crop_size"
        )
    return name, config.num_hidden_layers, config.image_size, config.patch_size


def _check_multiple(option: str, size: int, patch_size: int) -> None:
    if size % patch_size:
        below = size // patch_size * patch_size
        near = f"{below} or {below + patch_size}" if below else f"{patch_size}"
        raise InputError(f"--{option} {size} is no multiple of the patch size {patch_size}: use {near}")


def _kept_patches(option: str, size: int, patch_size: int, keep_rate: float, layers: Sequence[int]) -> tuple[int, ...]:
    from ..reduction import token_counts

    def counts(pixels: int, rate: float) -> list[int]:
        return token_counts((pixels // patch_size) ** 2, rate, len(layers))

    found = counts(size, keep_rate)
    if not layers or found[-1] >= MIN_KEPT_PATCHES:
        return tuple(found)
    enough_size = size
    while counts(enough_size, keep_rate)[-1] < MIN_KEPT_PATCHES:
        enough_size += patch_size
    remedy = f"use --{option} {enough_size}"
    # counts only grow with the rate, and 1.0 keeps everything
    rates = [rate / 100 for rate in range(1, 101) if counts(size, rate / 100)[-1] >= MIN_KEPT_PATCHES]
    if rates:
        remedy += f" or --keep_rate {rates[0]:g}"
    kept = ", ".join(str(count) for count in found[1:])
    blocks = ", ".join(str(layer) for layer in layers)
    raise InputError(
        f"--{option} {size} gives {found[0]} patches, of which blocks {blocks} would keep {kept} at keep_rate "
        f"{keep_rate:g}; at least {MIN_KEPT_PATCHES} must stay: {remedy} or more, or fewer --reduction_layers"
    )
