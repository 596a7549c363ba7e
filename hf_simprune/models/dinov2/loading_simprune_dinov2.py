# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained` of the SimPrune DINOv2: from own and stock checkpoints, every weight or an error."""

import os
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Dinov2Config, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .configuration_simprune_dinov2 import SimPruneDinov2Config


logger = logging.get_logger(__name__)

# What `from_pretrained` may leave to a fresh initialisation, and what it may find beside the network it loads.
_MAY_BE_NEW = ("classifier.",)
_BACKBONE = ("embeddings.", "layers.", "encoder.", "layernorm.")
_LAYERS = "encoder.layer."
# Arguments of `from_pretrained` that say where the file is, and those that say where and how the weights are put.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_PLACEMENT_ARGUMENTS = (
    "allow_all_kernels", "attn_implementation", "device_map", "device_mesh", "distributed_config",
    "fusion_config", "kernel_config", "max_memory", "offload_buffers", "offload_folder",
    "quantization_config", "tp_plan", "tp_size", "use_kernels",
)  # fmt: skip
_INIT_ARGUMENTS = ("add_pooling_layer",)


# What a class with `StrictLoading` has beside it, and leaves the place behind it to.
if TYPE_CHECKING:
    _Beside = PreTrainedModel
else:
    _Beside = object


class StrictLoading(_Beside):
    """Comes before the stock class among the bases of a model; `_stock_class` is the stock model of its kind."""

    config_class: type[SimPruneDinov2Config]
    _stock_class: type[PreTrainedModel]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, from this family's own checkpoints and from stock ones (`model_type` "dinov2").

        Returns the model, with `output_loading_info=True` also the dictionary of missing, unexpected and mismatched
        keys. Every weight comes from the checkpoint, except a new classifier and one of another size under
        `ignore_mismatched_sizes=True`: these are initialised and named in a warning. Raises `ValueError` for any
        other weight that is missing, does not fit or would be left out (a checkpoint without a mask token loads with
        `use_mask_token=False`), for a checkpoint of another model type, and for files that hold no sound configuration
        or weights. Weights are read from safetensors; `use_safetensors=False` allows pickled ones.
        """
        name = pretrained_model_name_or_path
        kwargs.setdefault("use_safetensors", True)
        try:
            model, info = cls._load(name, *model_args, config=config, **kwargs)
        except (OSError, ValueError, StrictDataclassError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the libraries answer unsound files with all kinds of errors
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if "ignore_mismatched_sizes" in reason or "unexpected keyword argument" in reason:
                raise  # the caller's to mend, and said as transformers says it
            raise ValueError(f"{cls.__name__} cannot load {name}: {reason}") from error
        return (model, info) if output_loading_info else model

    @classmethod
    def _load(
        cls,
        name: str | os.PathLike | None,
        *model_args: Any,
        config: Any,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        explicit_depth = config is not None or "num_hidden_layers" in kwargs
        own_type, stock_type = cls.config_class.model_type, Dinov2Config.model_type
        model_type = own_type if name is None else _find_model_type(name, config, hub, stock_type)
        if model_type not in (own_type, stock_type):
            raise ValueError(
                f"{name} holds a model of type {model_type!r}: {cls.__name__} loads {stock_type!r} and {own_type!r}"
            )
        if isinstance(config, Dinov2Config) and not isinstance(config, cls.config_class):
            config = cls.config_class.from_stock(config)
        if name is not None and model_type == stock_type:
            model, info = cls._from_stock_checkpoint(name, *model_args, config=config, **kwargs)
        else:
            # Any: transformers declares a model, which it is without `output_loading_info`.
            loaded: Any = super().from_pretrained(name, *model_args, config=config, output_loading_info=True, **kwargs)
            model, info = loaded
        depth = model.config.num_hidden_layers if explicit_depth else None
        _check_loaded(cls.__name__, name, info, cls.base_model_prefix, depth)
        return model, info

    @classmethod
    def _from_stock_checkpoint(
        cls,
        name: str | os.PathLike,
        *model_args: Any,
        config: Any,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Read with the stock class, which knows every tensor name there has been, then hand over in memory."""
        placement = {key: kwargs.pop(key) for key in _PLACEMENT_ARGUMENTS if key in kwargs}
        init_arguments = {key: kwargs.pop(key) for key in _INIT_ARGUMENTS if key in kwargs}
        if not isinstance(config, PreTrainedConfig):
            hub = {key: kwargs.pop(key) for key in _HUB_ARGUMENTS if key in kwargs}
            source = name if config is None else config
            config, kwargs = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **hub, **kwargs)
            kwargs.update(hub)
        if config.token_reduction is not None:
            with torch.device("meta"):
                cls(config)  # what cannot be done is said before weights are fetched
        loaded: Any = cls._stock_class.from_pretrained(
            name, *model_args, config=config.to_stock(ignore_reduction=True), output_loading_info=True, **kwargs
        )
        stock, info = loaded
        loaded = super().from_pretrained(
            None,
            *model_args,
            config=config,
            state_dict=stock.state_dict(),
            dtype=stock.dtype,
            output_loading_info=True,
            **placement,
            **init_arguments,
        )
        model, handed_over = loaded
        lost = {key: sorted(map(str, keys)) for key, keys in handed_over.items() if keys}
        if lost:
            raise ValueError(f"{cls.__name__} could not take over all weights of {name}: {lost}")
        model.name_or_path = model.config.name_or_path = str(name)
        return model, info


def _find_model_type(name: str | os.PathLike, config: Any, hub: dict[str, Any], default: str) -> str:
    try:
        values, _ = PreTrainedConfig.get_config_dict(name, **hub)
    except OSError:
        # With a configuration at hand, transformers loads a folder that holds nothing but weights.
        if config is None:
            raise
        values = {}
    if not values and config is None:
        raise ValueError(f"{name} has no config.json: give the configuration of its weights as config")
    return values.get("model_type", default)


def _check_loaded(
    class_name: str, name: str | os.PathLike | None, info: dict[str, Any], prefix: str, depth: int | None
) -> None:
    """Raise unless every weight of the backbone was loaded; `depth` is given where fewer blocks were asked for."""

    def bare(key: str) -> str:
        return key.removeprefix(f"{prefix}.")

    def asked_away(key: str) -> bool:
        index = bare(key).removeprefix(_LAYERS).partition(".")[0]
        return depth is not None and bare(key).startswith(_LAYERS) and index.isdigit() and int(index) >= depth

    missing = sorted(info["missing_keys"])
    mismatched = sorted(key[0] for key in info["mismatched_keys"])
    faults = {
        "missing": [key for key in missing if not bare(key).startswith(_MAY_BE_NEW)],
        "of another size": [key for key in mismatched if not bare(key).startswith("classifier.")],
        "left out": [
            key
            for key in sorted(info["unexpected_keys"])
            if bare(key).startswith(_BACKBONE) and not asked_away(key) and not key.endswith("embeddings.mask_token")
        ],
    }
    for fault, keys in faults.items():
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise ValueError(f"{class_name}: weights {fault} in {name}: {', '.join(keys[:5])}{more}")
    if missing or mismatched:
        logger.warning(f"{class_name}: not in {name}, newly initialised: {', '.join(missing + mismatched)}")


__all__ = ["StrictLoading"]
