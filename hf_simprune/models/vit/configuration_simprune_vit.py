# SPDX-License-Identifier: Apache-2.0
"""Configuration of the SimPrune ViT."""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.vit.configuration_vit import ViTConfig


@strict
class SimPruneViTConfig(ViTConfig):
    r"""
    A [`ViTConfig`] with stochastic depth and the layer norm epsilon of DINO and DeiT.

    Read from a stock folder or repository (`model_type` "vit"), it takes that file's values and, for what the file
    leaves out, the defaults of [`ViTConfig`] (`layer_norm_eps` 1e-12), so that the network computes what the stock
    one computes. Any other `model_type` raises a `ValueError`.

    drop_path_rate (`float`, *optional*, defaults to 0.0):
        Probability, in [0, 1), with which the last block's residual branches are skipped for a sample in training;
        it grows linearly over the blocks, from 0 (https://huggingface.co/papers/1603.09382).
    layer_norm_eps (`float`, *optional*, defaults to 1e-6):
        Epsilon of the layer norms.
    """

    model_type = "simprune_vit"

    layer_norm_eps: float = 1e-6
    drop_path_rate: float | int = 0.0

    def validate_drop_path_rate(self) -> None:
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {self.drop_path_rate}")

    @classmethod
    def from_stock(cls, config: ViTConfig) -> "SimPruneViTConfig":
        """The same network as the stock `config` describes, without stochastic depth."""
        return cls.from_dict(_as_own(config.to_dict()))

    def to_stock(self) -> ViTConfig:
        """The stock configuration of the same network; stochastic depth, which has no weights, is left out."""
        values = self.to_dict()
        for key in ("model_type", "drop_path_rate", "auto_map", "architectures"):
            values.pop(key, None)
        return ViTConfig.from_dict(values)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = values.get("model_type", ViTConfig.model_type)
        if found == ViTConfig.model_type:
            stock = ViTConfig.from_dict(dict(values)).to_dict()
            values = _as_own({**values, **{key: stock[key] for key in ViTConfig.__annotations__}})
        elif found != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type {found!r}: {cls.__name__} takes "
                f"{ViTConfig.model_type!r} and {cls.model_type!r}"
            )
        return values, kwargs


def _as_own(stock: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in stock.items() if key not in ("architectures", "auto_map")}
    return {**own, "model_type": SimPruneViTConfig.model_type}


__all__ = ["SimPruneViTConfig"]
