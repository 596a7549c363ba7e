# SPDX-License-Identifier: Apache-2.0
"""Configuration of the SimPrune DeiT."""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.deit.configuration_deit import DeiTConfig


# What an entry of `block_maps` says besides its kind.
_MAP_SETTINGS = {
    "linear": (),
    "low_rank": ("rank",),
    "mlp": (),
    "res_mlp": (),
    "block": ("attention", "mlp"),
}
_HALVES = ("full", "linear", "const")
# The most that a configuration may ask for: far beyond any network there is, and refused before anything is built.
_MOST = {
    "num_hidden_layers": 1000, "hidden_size": 2**16, "num_attention_heads": 2**12, "intermediate_size": 2**20,
    "num_channels": 2**12, "image_size": 2**16, "patch_size": 2**16, "num_labels": 2**20,
}  # fmt: skip
# What the stock configuration does not have.
_OWN_FIELDS = (
    "drop_path_rate", "block_maps", "token_reduction", "keep_rate", "reduction_layers", "reduction_options",
    "restore_tokens",
)  # fmt: skip


@strict
class SimPruneDeiTConfig(DeiTConfig):
    r"""
    A [`DeiTConfig`] with stochastic depth, the layer norm epsilon of DINO and DeiT, and maps in the place of blocks.

    Read from a stock folder or repository (`model_type` "deit"), it takes that file's values and, for what the file
    leaves out, the defaults of [`DeiTConfig`] (`layer_norm_eps` 1e-12), so that the network computes what the stock
    one computes. Any other `model_type` raises a `ValueError`.

    drop_path_rate (`float`, *optional*, defaults to 0.0):
        Probability, in [0, 1), with which the last block's residual branches are skipped for a sample in training;
        it grows linearly over the blocks, from 0 (https://huggingface.co/papers/1603.09382).
    layer_norm_eps (`float`, *optional*, defaults to 1e-6):
        Epsilon of the layer norms.
    block_maps (`dict[str, dict]`, *optional*):
        What stands in for a block, by its index ("0" is the first) among the `num_hidden_layers` modules there are.
        One map for the whole: `{"kind": "linear"}`, `{"kind": "low_rank", "rank": 16}`, `{"kind": "mlp"}` or
        `{"kind": "res_mlp"}`. One for a half: `{"kind": "block", "attention": "linear", "mlp": "full"}`, where each
        half is "full", "linear" or "const". Anything else is an error that names the entry.
    token_reduction (`str`, *optional*):
        Method that makes patch tokens fewer on the way through the network, one that needs no training, such as
        "tome". What cannot be done is a `ValueError` when the network is built, so that settings come in any order.
    keep_rate (`float`, *optional*, defaults to 1.0):
        Share of the patch tokens, in (0, 1], that goes on from every reduction layer.
    reduction_layers (`list[int]`, *optional*):
        0-based blocks at which tokens leave; a quarter, half and three quarters of the depth by default.
    reduction_options (`dict`, *optional*):
        Options of the method by name, such as `{"fuse": False}`.
    restore_tokens (`bool`, *optional*, defaults to `False`):
        Whether `last_hidden_state` has all patch tokens again, each from the token that stands for it.
    """

    model_type = "simprune_deit"

    layer_norm_eps: float = 1e-6
    drop_path_rate: float | int = 0.0
    block_maps: dict[str, dict[str, Any]] | None = None
    token_reduction: str | None = None
    keep_rate: float | int = 1.0
    reduction_layers: list[int] | tuple[int, ...] | None = None
    reduction_options: dict[str, Any] | None = None
    restore_tokens: bool = False

    def validate_sizes(self) -> None:
        _check_sizes({name: getattr(self, name) for name in _MOST})
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
            )

    def validate_drop_path_rate(self) -> None:
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {self.drop_path_rate}")

    def validate_block_maps(self) -> None:
        for key, spec in (self.block_maps or {}).items():
            fault = _map_fault(key, spec, self.num_hidden_layers, self.hidden_size)
            if fault:
                raise ValueError(f"block_maps[{key!r}] = {spec}: {fault}")

    @classmethod
    def from_stock(cls, config: DeiTConfig) -> "SimPruneDeiTConfig":
        """The same network as the stock `config` describes, without stochastic depth.

        A `config` of the own type is copied: of code that comes with a local folder, transformers makes two classes.
        """
        values = config.to_dict()
        own = cls.from_dict(values if config.model_type == cls.model_type else _as_own(values))
        own._attn_implementation = config._attn_implementation  # not among the values
        return own

    def to_stock(self, ignore_reduction: bool = False) -> DeiTConfig:
        """The stock configuration of the same network; stochastic depth, which has no weights, is left out.

        Raises `ValueError` where blocks are replaced or tokens reduced, which a stock network cannot express; with
        `ignore_reduction` it is the network without token reduction.
        """
        stock = DeiTConfig.model_type
        if self.block_maps:
            raise ValueError(f"block_maps: maps replace blocks {', '.join(self.block_maps)}, {stock!r} has none")
        if self.token_reduction is not None and not ignore_reduction:
            raise ValueError(f"token_reduction {self.token_reduction}: {stock!r} has none")
        values = self.to_dict()
        for key in ("model_type", "auto_map", "architectures", *_OWN_FIELDS):
            values.pop(key, None)
        return DeiTConfig.from_dict(values)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        _check_sizes(values)
        found = values.get("model_type", DeiTConfig.model_type)
        if found == DeiTConfig.model_type:
            stock = DeiTConfig.from_dict(dict(values)).to_dict()
            values = _as_own({**values, **{key: stock[key] for key in DeiTConfig.__annotations__}})
        elif found != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type {found!r}: {cls.__name__} takes "
                f"{DeiTConfig.model_type!r} and {cls.model_type!r}"
            )
        return values, kwargs


def _check_sizes(values: dict[str, Any]) -> None:
    """Of a file too, before there is a configuration: that lists every class, and of some networks every block."""
    for name, most in _MOST.items():
        found = values.get(name)
        least = 0 if name == "num_labels" else 1
        for size in found if isinstance(found, (list, tuple)) else (found,):
            if isinstance(size, (int, float)) and not least <= size <= most:
                raise ValueError(f"{name} must be from {least} to {most}, got {str(found)[:20]}")


def _map_fault(key: str, spec: dict[str, Any], depth: int, width: int) -> str | None:
    """What is wrong with an entry of `block_maps`, None if nothing is."""
    if not (key.isdecimal() and key == str(int(key)) and int(key) < depth):
        return f"the network has blocks 0 to {depth - 1}"
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in _MAP_SETTINGS:
        return f"kind {kind!r} is unknown, choose one of {', '.join(_MAP_SETTINGS)}"
    settings = {name: value for name, value in spec.items() if name != "kind"}
    if sorted(settings) != sorted(_MAP_SETTINGS[kind]):
        return f"kind {kind!r} takes {' and '.join(_MAP_SETTINGS[kind]) or 'nothing else'}"
    if kind == "low_rank" and not (type(spec["rank"]) is int and 1 <= spec["rank"] <= width):
        return f"rank must be a whole number from 1 to {width}"
    if kind == "block":
        for half, found in settings.items():
            if found not in _HALVES:
                return f"{half} must be one of {', '.join(_HALVES)}"
        if set(settings.values()) == {"full"}:
            return "nothing is replaced, leave the entry out"
    return None


def _as_own(stock: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in stock.items() if key not in ("architectures", "auto_map")}
    return {**own, "model_type": SimPruneDeiTConfig.model_type}


__all__ = ["SimPruneDeiTConfig"]
