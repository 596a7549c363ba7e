# SPDX-License-Identifier: Apache-2.0
"""Networks that are built by name, with the initialisation of DINO and a layer norm epsilon of 1e-6.

Sizes: DeiT (https://huggingface.co/papers/2012.12877), whose small and tiny are also those of DINO; `vit_micro` is
for small images on a CPU. DINO's own `deit_small` has one prefix token: here it is `vit_small`. `dinov2_small` and
`dinov2_base` are those of DINOv2 (https://huggingface.co/papers/2304.07193): patches of 14 pixels, LayerScale that
starts at 1e-5, a mask token, an ordinary MLP; `dinov2_tiny` has the sizes of DeiT-tiny.
"""

from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ..errors import InputError
from .deit import SimPruneDeiTConfig, SimPruneDeiTModel
from .dinov2 import SimPruneDinov2Config, SimPruneDinov2Model
from .vit import SimPruneViTConfig, SimPruneViTModel


MLP_RATIO = 4


def _sizes(width: int, depth: int, heads: int, patch_size: int = 16) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "patch_size": patch_size,
    }


ARCHITECTURES: dict[str, dict[str, int]] = {
    "vit_micro": _sizes(192, 6, 3, patch_size=4),
    "vit_tiny": _sizes(192, 12, 3),
    "vit_small": _sizes(384, 12, 6),
    "vit_base": _sizes(768, 12, 12),
    "deit_tiny": _sizes(192, 12, 3),
    "deit_small": _sizes(384, 12, 6),
    "deit_base": _sizes(768, 12, 12),
    "dinov2_tiny": _sizes(192, 12, 3, patch_size=14),
    "dinov2_small": _sizes(384, 12, 6, patch_size=14),
    "dinov2_base": _sizes(768, 12, 12, patch_size=14),
}

OVERRIDES = (
    "attention_probs_dropout_prob",
    "hidden_act",
    "hidden_dropout_prob",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layer_norm_eps",
    "num_attention_heads",
    "num_channels",
    "num_hidden_layers",
    "qkv_bias",
)
DINOV2_OVERRIDES = ("layerscale_value", "use_mask_token", "use_swiglu_ffn")
_FAMILIES = {
    "vit": (SimPruneViTConfig, SimPruneViTModel),
    "deit": (SimPruneDeiTConfig, SimPruneDeiTModel),
    "dinov2": (SimPruneDinov2Config, SimPruneDinov2Model),
}


def build_backbone(
    name: str, image_size: int, patch_size: int | None = None, drop_path_rate: float = 0.0, **overrides: Any
) -> SimPruneViTModel | SimPruneDeiTModel | SimPruneDinov2Model:
    """A randomly initialised backbone without pooler.

    Args:
        name: a key of `ARCHITECTURES`.
        image_size: side of the square images that the position embeddings are laid out for, in pixels.
        patch_size: side of a patch, in pixels; the architecture's own when None.
        drop_path_rate: stochastic depth of the last block, in [0, 1).
        overrides: other settings of the configuration (`OVERRIDES`, for DINOv2 also `DINOV2_OVERRIDES`); the MLP
            stays four times as wide as the tokens unless `intermediate_size` is given, for DINOv2 a multiple of
            `hidden_size`, of which a SwiGLU has two thirds.

    Raises `InputError` for an unknown name or setting, for sizes that do not divide and for values of the wrong kind.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"architecture {name!r} is unknown; choose one of {', '.join(ARCHITECTURES)}")
    family = name.partition("_")[0]
    known = OVERRIDES + DINOV2_OVERRIDES if family == "dinov2" else OVERRIDES
    unknown = [key for key in overrides if key not in known]
    if unknown:
        raise InputError(f"architecture setting {unknown[0]!r} is unknown; choose from {', '.join(known)}")
    values: dict[str, Any] = {**ARCHITECTURES[name], **overrides, "image_size": image_size}
    if patch_size is not None:
        values["patch_size"] = patch_size
    for key in ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if type(values[key]) is not int or values[key] < 1:
            raise InputError(f"{key} {values[key]!r} must be a whole number of at least 1")
    if image_size % values["patch_size"]:
        raise InputError(f"patch_size {values['patch_size']} does not divide image_size {image_size}")
    if values["hidden_size"] % values["num_attention_heads"]:
        raise InputError(
            f"num_attention_heads {values['num_attention_heads']} does not divide hidden_size {values['hidden_size']}"
        )
    values.setdefault("intermediate_size", MLP_RATIO * values["hidden_size"])
    if family == "dinov2":
        values["mlp_ratio"] = _mlp_ratio(values.pop("intermediate_size"), values["hidden_size"])
    config_class, model_class = _FAMILIES[family]
    try:
        config = config_class(drop_path_rate=drop_path_rate, **values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise InputError(f"architecture {name}: {' '.join(str(error).split())}") from None
    return model_class(config, add_pooling_layer=False)


def _mlp_ratio(intermediate_size: Any, hidden_size: int) -> int:
    """The configuration of DINOv2 has the width of the MLP as a whole multiple of that of the tokens."""
    if type(intermediate_size) is not int or intermediate_size < 1 or intermediate_size % hidden_size:
        raise InputError(f"intermediate_size {intermediate_size!r} must be a multiple of hidden_size {hidden_size}")
    return intermediate_size // hidden_size
