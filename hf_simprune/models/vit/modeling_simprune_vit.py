# SPDX-License-Identifier: Apache-2.0
"""The stock ViT: blocks that open for token reduction or are replaced, stochastic depth, strict loading."""

import os
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import (
    ViTAttention,
    ViTEmbeddings,
    ViTForImageClassification,
    ViTLayer,
    ViTModel,
    ViTPreTrainedModel,
)
from transformers.utils import logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .blocks_simprune_vit import KEPT, PLAIN, BlockFunctions, check_key_bias, run_reduced
from .configuration_simprune_vit import SimPruneViTConfig
from .maps_simprune_vit import SimPruneViTMapLayer, replace_halves
from .reduction_simprune_vit import INFERENCE_METHODS, BranchReducer, BranchWalk, ReductionStep, reducer_of


logger = logging.get_logger(__name__)

# What `from_pretrained` may leave to a fresh initialisation, and what it may find beside the network it loads.
_MAY_BE_NEW = ("classifier.", "pooler.")
_BACKBONE = ("embeddings.", "layers.", "encoder.", "layernorm.")
# Arguments of `from_pretrained` that say where the file is, and those that say where and how the weights are put.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_PLACEMENT_ARGUMENTS = (
    "allow_all_kernels", "attn_implementation", "device_map", "device_mesh", "distributed_config",
    "fusion_config", "kernel_config", "max_memory", "offload_buffers", "offload_folder",
    "quantization_config", "tp_plan", "tp_size", "use_kernels",
)  # fmt: skip
_INIT_ARGUMENTS = ("add_pooling_layer", "use_mask_token")


class SimPruneViTLayer(ViTLayer):
    """One transformer block, whole or one of its halves: tokens may leave between attention and MLP.

    Stochastic depth (https://huggingface.co/papers/1603.09382) is drawn per sample and per half, in training only.
    `spec`, an entry of `block_maps`, says which halves are maps.
    """

    def __init__(self, config: SimPruneViTConfig, drop_path_rate: float = 0.0, spec: dict | None = None) -> None:
        super().__init__(config)
        if spec is not None:
            replace_halves(self, config.hidden_size, spec)
        self.drop_path_rate = drop_path_rate
        # Functions that take the block: one compiled function serves all blocks, and a copied model stays sound.
        self.functions = PLAIN

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        half: str | None = None,
        num_queries: int | None = None,
        reduction: ReductionStep | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The whole block, or with `half` "attention" or "mlp" that half with its residual; (B, T, D) to (B, T, D).

        attention_mask: added to the attention scores, (B, 1, T, T), or (B, 1, 1, T) for a bias of the keys.
        num_queries: with the attention half only: no more than that many tokens, the first, come out. They equal
            those of the whole half at a fraction of its cost, which is all a loss on CLS needs of the last block.
        reduction: with the whole block only: makes the patch tokens fewer at its site, (B, T, D) to (B, T', D).
        """
        check_key_bias(self.attention, attention_mask)
        # Attention weights are recorded by a hook, which compiled code cannot run.
        run = PLAIN if kwargs.get("output_attentions") else self.functions
        hooked = run is PLAIN
        # How many samples are kept is known at once on a CPU only, and in no compiled code.
        on_cpu = hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and run is self.functions is PLAIN and isinstance(attention_mask, Tensor | None):
            run = KEPT
        # The scales are drawn outside of what is compiled: there, a rate is a constant and would cost a graph a block.
        if half is None:
            scales = self._residual_scale(hidden_states), self._residual_scale(hidden_states)
            if reduction is not None:
                return run_reduced(run, self, hidden_states, *scales, attention_mask, hooked, reduction, **kwargs)
            return run.block(self, hidden_states, *scales, attention_mask, hooked, **kwargs)
        if reduction is not None:
            raise ValueError(f"token reduction takes the whole block, got half {half!r}")
        scale = self._residual_scale(hidden_states)
        if half == "attention":
            return run.attention(self, hidden_states, scale, attention_mask, hooked, num_queries, **kwargs)
        if half == "mlp":
            return run.mlp(self, hidden_states, scale)
        raise ValueError(f"half must be None, 'attention' or 'mlp', got {half!r}")

    def _residual_scale(self, hidden_states: Tensor) -> Tensor | None:
        """(B, 1, 1): 0 for a sample whose branch is skipped, else 1 / keep; drawn as DINO draws it."""
        if self.drop_path_rate == 0.0 or not self.training:
            return None
        keep = 1.0 - self.drop_path_rate
        # float32 whatever the model's precision: in bfloat16 the draws are so coarse that the rate would be off.
        uniform = torch.rand((hidden_states.shape[0], 1, 1), device=hidden_states.device, dtype=torch.float32)
        return (keep + uniform).floor_().div_(keep).to(hidden_states.dtype)


class SimPruneViTPreTrainedModel(ViTPreTrainedModel):
    """What the model and the classifier share: initialisation, and loading that never leaves a block random."""

    config_class: type[SimPruneViTConfig] = SimPruneViTConfig
    config: SimPruneViTConfig
    _no_split_modules = ["ViTEmbeddings", "SimPruneViTLayer", "SimPruneViTMapLayer"]
    _can_record_outputs = {"hidden_states": [ViTLayer, SimPruneViTMapLayer], "attentions": ViTAttention}
    _stock_class: type[ViTPreTrainedModel]

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """As DINO: truncated normal for linear layers, tokens and positions, torch's own for the patch projection."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, nn.Conv2d):
            bound = (module.in_channels * module.kernel_size[0] * module.kernel_size[1]) ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, ViTEmbeddings):
            for name, parameter in module.named_parameters(recurse=False):
                if name != "mask_token":
                    init.trunc_normal_(parameter, std=std)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, from this family's own checkpoints and from stock ones (`model_type` "vit").

        Returns the model, with `output_loading_info=True` also the dictionary of missing, unexpected and mismatched
        keys. Every weight comes from the checkpoint, except a new classifier, one of another size under
        `ignore_mismatched_sizes=True`, and a pooler the checkpoint does not have: these are initialised and named in
        a warning. Raises `ValueError` for any other weight that is missing, does not fit or would be left out, for a
        checkpoint of another model type, and for files that hold no sound configuration or weights. Weights are read
        from safetensors; `use_safetensors=False` allows pickled ones.
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
        model_type = cls.config_class.model_type if name is None else _find_model_type(name, config, hub)
        stock_type = ViTConfig.model_type
        if model_type not in (cls.config_class.model_type, stock_type):
            raise ValueError(
                f"{name} holds a model of type {model_type!r}: {cls.__name__} loads {stock_type!r} and "
                f"{cls.config_class.model_type!r}"
            )
        if isinstance(config, ViTConfig) and not isinstance(config, cls.config_class):
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
        init_arguments = {key: kwargs[key] for key in _INIT_ARGUMENTS if key in kwargs}
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


def _find_model_type(name: str | os.PathLike, config: Any, hub: dict[str, Any]) -> str:
    try:
        values, _ = PreTrainedConfig.get_config_dict(name, **hub)
    except OSError:
        # With a configuration at hand, transformers loads a folder that holds nothing but weights.
        if config is None:
            raise
        values = {}
    if not values and config is None:
        raise ValueError(f"{name} has no config.json: give the configuration of its weights as config")
    return values.get("model_type", ViTConfig.model_type)


def _check_loaded(
    class_name: str, name: str | os.PathLike | None, info: dict[str, Any], prefix: str, depth: int | None
) -> None:
    """Raise unless every weight of the backbone was loaded; `depth` is given where fewer blocks were asked for."""

    def bare(key: str) -> str:
        return key.removeprefix(f"{prefix}.")

    def asked_away(key: str) -> bool:
        parts = bare(key).split(".")
        return depth is not None and parts[0] == "layers" and parts[1].isdigit() and int(parts[1]) >= depth

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


def _build_layer(config: SimPruneViTConfig, index: int) -> SimPruneViTLayer | SimPruneViTMapLayer:
    spec = (config.block_maps or {}).get(str(index))
    if spec is not None and spec["kind"] != "block":
        return SimPruneViTMapLayer(config.hidden_size, spec)
    return SimPruneViTLayer(config, config.drop_path_rate * index / max(config.num_hidden_layers - 1, 1), spec)


def _build_reducer(config: SimPruneViTConfig, num_prefix: int, grid: tuple[int, int]) -> BranchReducer | None:
    """What `config` says of token reduction, None if nothing. Raises `ValueError` for what cannot be done."""
    reducer = reducer_of(config, INFERENCE_METHODS, num_prefix, grid)
    if reducer is None:
        return None
    for index in reducer.layers:
        spec = (config.block_maps or {}).get(str(index), {"kind": "block", "attention": "full"})
        if spec["kind"] != "block":
            raise ValueError(f"reduction layer {index}: block_maps replaces it, and a map has no halves")
        if spec["attention"] != "full" and (reducer.needs != "nothing" or reducer.site == "attention"):
            raise ValueError(f"reduction layer {index}: block_maps replaces its attention, which {reducer.name} needs")
    return reducer


class SimPruneViTModel(SimPruneViTPreTrainedModel, ViTModel):
    """[`ViTModel`] whose blocks are [`SimPruneViTLayer`]s; without token reduction and maps it computes the same."""

    _stock_class = ViTModel

    def __init__(
        self, config: SimPruneViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False
    ) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer, use_mask_token=use_mask_token)
        config.validate_block_maps()  # again: `from_pretrained` may have changed the number of blocks
        self.layers = nn.ModuleList(_build_layer(config, index) for index in range(config.num_hidden_layers))
        self.reducer = _build_reducer(config, self.num_prefix_tokens, self._grid(*self.embeddings.image_size))
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """As in [`ViTModel`]. With `config.token_reduction` the patch tokens grow fewer on the way.

        `last_hidden_state` is then (B, prefix + K, D), with `config.restore_tokens` (B, prefix + N, D) in the order of
        the patches; `hidden_states` are the tokens there are behind every block.
        """
        if self.reducer is None:
            return super().forward(pixel_values, bool_masked_pos, interpolate_pos_encoding, attention_mask, **kwargs)
        if attention_mask is not None:
            raise ValueError(f"token_reduction {self.reducer.name} takes no attention_mask")
        return self._forward_reduced(pixel_values, bool_masked_pos, interpolate_pos_encoding, **kwargs)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def _forward_reduced(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None,
        interpolate_pos_encoding: bool | None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        assert self.reducer is not None  # `forward` goes here with one only
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        tokens = self.embeddings(pixel_values, bool_masked_pos, interpolate_pos_encoding)
        grid = self._grid(*pixel_values.shape[-2:])
        walk = BranchWalk(self.reducer, self.num_prefix_tokens, grid, records_before=self.config.restore_tokens)
        for index, layer in enumerate(self.layers):
            tokens = walk.block(index, layer, tokens, **kwargs)
        if self.config.restore_tokens:
            tokens = walk.restore(tokens)
        tokens = self.layernorm(tokens)
        pooled = self.pooler(tokens) if self.pooler is not None else None
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the patches of an image of that size in pixels."""
        rows, columns = self.embeddings.patch_embeddings.projection.stride
        return height // rows, width // columns

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patch tokens; CLS is the one at index 0."""
        return self.embeddings.position_embeddings.shape[1] - self.embeddings.patch_embeddings.num_patches

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, prefix + N, D), prefix tokens first, positions added.

        Position embeddings are interpolated whenever (H, W) differs from the configured image size.
        """
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        same_size = tuple(pixel_values.shape[-2:]) == tuple(self.embeddings.image_size)
        return self.embeddings(pixel_values, interpolate_pos_encoding=not same_size)

    def compile_blocks(self, **kwargs: Any) -> None:
        """Compile the blocks in place; `kwargs` go to `torch.compile`. All blocks share the compiled graphs."""
        # With and without gradient, scales and each crop size is a graph of its own: more than the default of eight.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        compiled = BlockFunctions._make(torch.compile(function, **kwargs) for function in PLAIN)
        for layer in self.layers:
            if isinstance(layer, SimPruneViTLayer):  # a map is no more than a product or two
                layer.functions = compiled


class SimPruneViTForImageClassification(SimPruneViTPreTrainedModel, ViTForImageClassification):
    """[`ViTForImageClassification`] on a [`SimPruneViTModel`]."""

    _stock_class = ViTForImageClassification

    def __init__(self, config: SimPruneViTConfig) -> None:
        super().__init__(config)
        self.vit = SimPruneViTModel(config, add_pooling_layer=False)
        self.post_init()


__all__ = ["SimPruneViTForImageClassification", "SimPruneViTModel"]
