# SPDX-License-Identifier: Apache-2.0
"""The stock DINOv2: blocks that open for token reduction or are replaced, stochastic depth, strict loading."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.dinov2.modeling_dinov2 import (
    Dinov2Attention,
    Dinov2Encoder,
    Dinov2ForImageClassification,
    Dinov2Layer,
    Dinov2Model,
    Dinov2PreTrainedModel,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .blocks_simprune_dinov2 import KEPT, PLAIN, BlockFunctions, check_key_bias, run_reduced
from .configuration_simprune_dinov2 import SimPruneDinov2Config
from .loading_simprune_dinov2 import StrictLoading
from .maps_simprune_dinov2 import SimPruneDinov2MapLayer, replace_halves
from .reduction_simprune_dinov2 import INFERENCE_METHODS, BranchReducer, BranchWalk, ReductionStep, reducer_of


class SimPruneDinov2Layer(Dinov2Layer):
    """One transformer block, whole or one of its halves: tokens may leave between attention and MLP.

    Stochastic depth (https://huggingface.co/papers/1603.09382) is drawn per sample and per half, in training only.
    `spec`, an entry of `block_maps`, says which halves are maps; these have no LayerScale.
    """

    layer_scale1: Any  # a LayerScale, or none where the half is a map
    layer_scale2: Any

    def __init__(self, config: SimPruneDinov2Config, drop_path_rate: float = 0.0, spec: dict | None = None) -> None:
        super().__init__(config)
        self.drop_path = nn.Identity()  # the stock block's, which has one rate for all blocks
        if spec is not None:
            replace_halves(self, config.hidden_size, spec)
            if spec["attention"] != "full":
                self.layer_scale1 = nn.Identity()
            if spec["mlp"] != "full":
                self.layer_scale2 = nn.Identity()
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


class SimPruneDinov2PreTrainedModel(StrictLoading, Dinov2PreTrainedModel):
    """What encoder, model and classifier share: initialisation, and loading that never leaves a block random."""

    config_class: type[SimPruneDinov2Config] = SimPruneDinov2Config
    config: SimPruneDinov2Config
    _no_split_modules = ["Dinov2Embeddings", "SimPruneDinov2Layer", "SimPruneDinov2MapLayer"]
    _can_record_outputs = {"hidden_states": [Dinov2Layer, SimPruneDinov2MapLayer], "attentions": Dinov2Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As DINO: truncated normal for linear layers, CLS and positions, torch's own for the patch projection.

        The mask token starts at zero and LayerScale at `layerscale_value`, as in DINOv2.
        """
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            bound = (module.in_channels * module.kernel_size[0] * module.kernel_size[1]) ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)


def _build_layer(config: SimPruneDinov2Config, index: int) -> SimPruneDinov2Layer | SimPruneDinov2MapLayer:
    spec = (config.block_maps or {}).get(str(index))
    if spec is not None and spec["kind"] != "block":
        return SimPruneDinov2MapLayer(config.hidden_size, spec)
    return SimPruneDinov2Layer(config, config.drop_path_rate * index / max(config.num_hidden_layers - 1, 1), spec)


def _build_reducer(config: SimPruneDinov2Config, num_prefix: int, grid: tuple[int, int]) -> BranchReducer | None:
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


class SimPruneDinov2Encoder(SimPruneDinov2PreTrainedModel, Dinov2Encoder):
    """[`Dinov2Encoder`] of [`SimPruneDinov2Layer`]s and maps."""

    _stock_class = Dinov2Encoder

    def __init__(self, config: SimPruneDinov2Config) -> None:
        super().__init__(config)
        config.validate_block_maps()  # again: `from_pretrained` may have changed the number of blocks
        self.layer = nn.ModuleList(_build_layer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


class SimPruneDinov2Model(SimPruneDinov2PreTrainedModel, Dinov2Model):
    """[`Dinov2Model`] whose blocks are [`SimPruneDinov2Layer`]s.

    Without token reduction and maps it computes the same. There is no pooler: `add_pooling_layer`, which the other
    families have, can be False only.
    """

    _stock_class = Dinov2Model

    def __init__(self, config: SimPruneDinov2Config, add_pooling_layer: bool = False) -> None:
        if add_pooling_layer:
            raise ValueError("add_pooling_layer=True: DINOv2 has no pooler, its pooler_output is the CLS token")
        super().__init__(config)
        self.encoder = SimPruneDinov2Encoder(config)
        grid = self._grid(*self.embeddings.patch_embeddings.image_size)
        self.reducer = _build_reducer(config, self.num_prefix_tokens, grid)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """As in [`Dinov2Model`]. With `config.token_reduction` the patch tokens grow fewer on the way.

        `last_hidden_state` is then (B, 1 + K, D), with `config.restore_tokens` (B, 1 + N, D) in the order of the
        patches; `hidden_states` are the tokens there are behind every block.
        """
        if self.reducer is None:
            return super().forward(pixel_values, bool_masked_pos, attention_mask, **kwargs)
        if attention_mask is not None:
            raise ValueError(f"token_reduction {self.reducer.name} takes no attention_mask")
        return self._forward_reduced(pixel_values, bool_masked_pos, **kwargs)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def _forward_reduced(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        assert self.reducer is not None  # `forward` goes here with one only
        tokens = self.embeddings(pixel_values, bool_masked_pos)
        grid = self._grid(*pixel_values.shape[-2:])
        walk = BranchWalk(self.reducer, self.num_prefix_tokens, grid, records_before=self.config.restore_tokens)
        for index, layer in enumerate(self.layers):
            tokens = walk.block(index, layer, tokens, **kwargs)
        if self.config.restore_tokens:
            tokens = walk.restore(tokens)
        tokens = self.layernorm(tokens)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens[:, 0])

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the patches of an image of that size in pixels."""
        rows, columns = self.embeddings.patch_embeddings.projection.stride
        return height // rows, width // columns

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, which the checkpoint has under `encoder.layer`."""
        return self.encoder.layer

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patch tokens: CLS."""
        return 1

    def embed(self, pixel_values: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) to tokens (B, 1 + N, D), CLS first, positions added.

        Where `masks` (B, N), of type bool, is true, the mask token takes the patch's place, before its position is
        added; N counts the patches row by row. Position embeddings are interpolated whenever (H, W) differs from the
        configured image size.

        Raises `ValueError` for masks of a network without a mask token.
        """
        if masks is not None and self.embeddings.mask_token is None:
            raise ValueError("masks: this network has no mask token, its configuration says use_mask_token=False")
        return self.embeddings(pixel_values, bool_masked_pos=masks)

    def compile_blocks(self, **kwargs: Any) -> None:
        """Compile the blocks in place; `kwargs` go to `torch.compile`. All blocks share the compiled graphs."""
        # With and without gradient, scales and each crop size is a graph of its own: more than the default of eight.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        compiled = BlockFunctions._make(torch.compile(function, **kwargs) for function in PLAIN)
        for layer in self.layers:
            if isinstance(layer, SimPruneDinov2Layer):  # a map is no more than a product or two
                layer.functions = compiled


class SimPruneDinov2ForImageClassification(SimPruneDinov2PreTrainedModel, Dinov2ForImageClassification):
    """[`Dinov2ForImageClassification`] on a [`SimPruneDinov2Model`].

    Its head reads the mean patch token beside CLS: raises `ValueError` for token reduction without `restore_tokens`.
    """

    _stock_class = Dinov2ForImageClassification

    def __init__(self, config: SimPruneDinov2Config) -> None:
        super().__init__(config)
        self.dinov2 = SimPruneDinov2Model(config)
        if config.token_reduction is not None and not config.restore_tokens:
            raise ValueError(
                f"token_reduction {config.token_reduction}: the classifier of DINOv2 averages the patch tokens, of "
                "which some would be gone or merged: give restore_tokens=True"
            )
        self.post_init()


__all__ = ["SimPruneDinov2ForImageClassification", "SimPruneDinov2Model"]
