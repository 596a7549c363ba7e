# SPDX-License-Identifier: Apache-2.0
"""Sizes that follow from the options and the network: crops, patches, depth, and the tokens each stage keeps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InputError
from ..options.common import check_revision
from .arguments import DinoArguments
from .reduction_choice import Crops, chosen_reducer, kept_patches


if TYPE_CHECKING:  # --help must not wait for torch
    from ..reduction import ReductionSetting


DEFAULT_ARCHITECTURE = "vit_small"
DEFAULT_ARCHITECTURES = {"dino": DEFAULT_ARCHITECTURE, "dinov2": "dinov2_small"}
DEFAULT_IMAGE_SIZE = 224
LOCAL_CROP_RATIO = 96 / 224
OWN_MODEL_TYPES = ("simprune_vit", "simprune_deit", "simprune_dinov2")
MODEL_TYPES = ("vit", "deit", "dinov2", *OWN_MODEL_TYPES)
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
    "layerscale_value": float,
    "use_swiglu_ffn": bool,
}
DINOV2_OVERRIDES = ("layerscale_value", "use_swiglu_ffn")


@dataclass(frozen=True)
class Geometry:
    """Sizes in pixels a side; `reduction_layers` ascending, empty for dense training.

    global_counts, local_counts: patch tokens before the first stage and after each of them; no local ones: empty.
    setting: what the token reducer is built for, None for dense training.
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
    setting: "ReductionSetting | None" = None


class Network(NamedTuple):
    """The sizes of a network that matter here; num_prefix counts [CLS], distillation and register tokens."""

    name: str
    depth: int
    image_size: int
    patch_size: int
    hidden_size: int
    num_heads: int
    num_prefix: int


def geometry(args: DinoArguments) -> Geometry:
    """The sizes of a run. Reads at most a model's configuration, no weights and no data.

    Raises:
        InputError: unknown architecture or checkpoint, a crop size that is no multiple of the patch size, a reduction
            layer out of range or named twice, what the token reduction cannot do, a stage that would keep fewer than 4
            patches of a crop.
    """
    network = _architecture(args) if args.model_name_or_path is None else _checkpoint(args)
    patch_size = network.patch_size
    global_size = args.global_crop_size or network.image_size
    local_size = args.local_crop_size or default_local_crop_size(global_size, patch_size)
    _check_multiple("image_size", network.image_size, patch_size)
    _check_multiple("global_crop_size", global_size, patch_size)
    crops = [Crops("global_crop_size", global_size, patch_size)]
    if args.local_crops_number > 0:
        _check_multiple("local_crop_size", local_size, patch_size)
        crops.append(Crops("local_crop_size", local_size, patch_size))
    setting = _reduction_setting(args, network, crops)
    reducer = chosen_reducer(args, setting)
    counts = kept_patches(args, reducer, setting, crops)
    return Geometry(
        name=network.name,
        depth=network.depth,
        image_size=network.image_size,
        patch_size=patch_size,
        global_crop_size=global_size,
        local_crop_size=local_size,
        reduction_layers=() if reducer is None else reducer.layers,
        global_counts=counts[0],
        local_counts=counts[1] if len(counts) > 1 else (),
        setting=None if reducer is None else setting,
    )


def _reduction_setting(args: DinoArguments, network: Network, crops: list[Crops]) -> "ReductionSetting":
    from ..reduction import ReductionSetting, default_reduction_layers, validate_reduction_layers

    layers: Sequence[int] | None = args.reduction_layers
    if layers is None or args.token_reduction == "none":
        layers = default_reduction_layers(network.depth)
    return ReductionSetting(
        layers=validate_reduction_layers(layers, network.depth),
        depth=network.depth,
        hidden_size=network.hidden_size,
        num_heads=network.num_heads,
        num_prefix=network.num_prefix,
        grids=tuple(crop.grid for crop in crops),
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
        if kind is float and not 0 <= overrides[key] < 1 and (key, overrides[key]) != ("layerscale_value", 1):
            raise InputError(f"--config_overrides {text}: {key} must be from 0 up to, not including, 1")
    return overrides


def _architecture(args: DinoArguments) -> Network:
    from transformers.activations import ACT2FN

    from ..models.architectures import ARCHITECTURES

    name = args.architecture or DEFAULT_ARCHITECTURES.get(args.objective, DEFAULT_ARCHITECTURE)
    if name not in ARCHITECTURES:
        raise InputError(f"--architecture {name} is unknown: choose one of {', '.join(ARCHITECTURES)}")
    overrides = parse_config_overrides(args.config_overrides)
    for key in overrides if not name.startswith("dinov2_") else ():
        if key in DINOV2_OVERRIDES:
            raise InputError(f"--config_overrides {args.config_overrides}: {key} is of DINOv2 networks, not of {name}")
    sizes = {**ARCHITECTURES[name], **overrides}
    if sizes.get("hidden_act", "gelu") not in ACT2FN:
        raise InputError(f"--config_overrides: hidden_act {sizes['hidden_act']} is unknown; use gelu, relu or silu")
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if width % heads:
        raise InputError(f"--config_overrides: hidden_size {width} is no multiple of num_attention_heads {heads}")
    if name.startswith("dinov2_") and sizes.get("intermediate_size", width) % width:
        raise InputError(
            f"--config_overrides: intermediate_size {sizes['intermediate_size']} is no multiple of hidden_size "
            f"{width}, which DINOv2 asks for"
        )
    return Network(
        name=name,
        depth=sizes["num_hidden_layers"],
        image_size=args.image_size or DEFAULT_IMAGE_SIZE,
        patch_size=args.patch_size or sizes["patch_size"],
        hidden_size=width,
        num_heads=heads,
        num_prefix=2 if name.startswith("deit_") else 1,
    )


def _checkpoint(args: DinoArguments) -> Network:
    from transformers import AutoConfig

    from .. import models  # noqa: F401  registers the model types
    from ..models.untrusted import check_config, reading

    name = args.model_name_or_path
    assert name is not None
    check_revision("model_revision", args.model_revision, name)
    with reading(f"--model_name_or_path {name}: no model there"):
        check_config(name, revision=args.model_revision, token=args.token)
        config = AutoConfig.from_pretrained(
            name, revision=args.model_revision, token=args.token, trust_remote_code=args.trust_remote_code
        )
    if config.model_type not in MODEL_TYPES:
        raise InputError(
            f"--model_name_or_path {name}: a {config.model_type} model; DINO starts from {', '.join(MODEL_TYPES)}"
        )
    if config.model_type in OWN_MODEL_TYPES and config.token_reduction is not None:
        raise InputError(
            f"--model_name_or_path {name}: it reduces tokens at inference (token_reduction {config.token_reduction}); "
            "DINO starts from networks with all tokens: give the model it was made from, and --token_reduction"
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
    return Network(
        name=name,
        depth=config.num_hidden_layers,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_prefix=2 if "deit" in config.model_type else 1,
    )


def _check_multiple(option: str, size: int, patch_size: int) -> None:
    if size % patch_size:
        below = size // patch_size * patch_size
        near = f"{below} or {below + patch_size}" if below else f"{patch_size}"
        raise InputError(f"--{option} {size} is no multiple of the patch size {patch_size}: use {near}")
