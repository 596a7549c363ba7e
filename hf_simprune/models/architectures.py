# SPDX-License-Identifier: Apache-2.0
"""Networks that are built by name, with the initialisation of DINO and a layer norm epsilon of 1e-6.

Sizes: DeiT (https://huggingface.co/papers/2012.12877), whose small and tiny are also those of DINO; `vit_micro` is
for small images on a CPU. DINO's own `deit_small` has one prefix token: here it is `vit_small`.
"""

from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ..errors import InputError
from .deit import SimPruneDeiTConfig, SimPruneDeiTModel
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


def build_backbone(
    name: str, image_size: int, patch_size: int | None = None, drop_path_rate: float = 0.0, **overrides: Any
) -> SimPruneViTModel | SimPruneDeiTModel:
    """A randomly initialised backbone without pooler.

    Args:
        name: a key of `ARCHITECTURES`.
        image_size: side of the square images that the position embeddings are laid out for, in pixels.
        patch_size: side of a patch, in pixels; the architecture's own when None.
        drop_path_rate: stochastic depth of the last block, in [0, 1).
        overrides: other settings of the configuration (`OVERRIDES`); the MLP stays four times as wide as the tokens
            unless `intermediate_size` is given.

    Raises `InputError` for an unknown name or setting, for sizes that do not divide and for values of the wrong kind.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"architecture {name!r} is unknown; choose one of {', '.join(ARCHITECTURES)}")
    unknown = [key for key in overrides if key not in OVERRIDES]
    if unknown:
        raise InputError(f"architecture setting {unknown[0]!r} is unknown; choose from {', '.join(OVERRIDES)}")
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
    is_deit = name.startswith("deit_")
    config_class, model_class = (
        (SimPruneDeiTConfig, SimPruneDeiTModel) if is_deit else (SimPruneViTConfig, SimPruneViTModel)
    )
    try:
        config = config_class(drop_path_rate=drop_path_rate, **values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise InputError(f"architecture {name}: {' '.join(str(error).split())}") from None
    return model_class(config, add_pooling_layer=False)
