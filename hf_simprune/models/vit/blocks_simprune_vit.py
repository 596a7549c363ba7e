# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a block of the SimPrune ViT: its halves, stochastic depth, token reduction."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, eager_attention_forward

from .reduction_simprune_vit import ReductionStep, attend_pooled, seen_of_attention


class BlockFunctions(NamedTuple):
    """The arithmetic of a block and of its halves, as they are or compiled."""

    attention: Callable[..., Tensor]
    mlp: Callable[..., Tensor]
    block: Callable[..., Tensor]
    observed: Callable[..., tuple[Tensor, Tensor]]

    def __deepcopy__(self, memo: dict[int, Any]) -> "BlockFunctions":
        """Itself: a copied block runs as its original does, which is told from `PLAIN` by identity."""
        return self


def run_attention(
    layer: ViTLayer,
    hidden_states: Tensor,
    scale: Tensor | None,
    attention_mask: Tensor | None,
    hooked: bool,
    num_queries: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """The attention half of a block with its residual.

    `scale` (B, 1, 1) is that of stochastic depth, or None; `hooked` is False where the hook with which transformers
    records attention weights must stay out, which is in compiled code; `num_queries` as in the block's `forward`.
    """
    normed = layer.layernorm_before(hidden_states)
    if num_queries is not None:
        update = _attend_first(layer.attention, normed, num_queries, attention_mask)
        return _add(hidden_states[:, :num_queries], layer.dropout(update), scale)
    attend = layer.attention if hooked else layer.attention.forward
    update, _ = attend(normed, attention_mask, **kwargs)
    return _add(hidden_states, layer.dropout(update), scale)


def _attend_first(attention: nn.Module, hidden_states: Tensor, count: int, attention_mask: Tensor | None) -> Tensor:
    """What attention gives to the first `count` tokens, which still see all: (B, T, D) to (B, count, D)."""
    if not isinstance(attention, ViTAttention):
        return attention(hidden_states[:, :count])[0]
    query = _heads(attention, attention.q_proj(hidden_states[:, :count]))
    key = _heads(attention, attention.k_proj(hidden_states))
    value = _heads(attention, attention.v_proj(hidden_states))
    if attention_mask is not None:
        attention_mask = attention_mask[:, :, :count]  # a bias of the keys has one row for all queries
    return _attend(attention, query, key, value, attention_mask)


def _heads(attention: ViTAttention, projected: Tensor) -> Tensor:
    """(B, T, D) to (B, heads, T, head width)."""
    return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _attend(
    attention: ViTAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """Attention of the configured kind and the output projection: (B, heads, T, head width) to (B, T, D)."""
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    dropout = attention.attention_dropout if attention.training else 0.0
    mixed, _ = attend(
        attention, query, key, value, attention_mask, dropout=dropout, scaling=attention.scaling, **kwargs
    )
    return attention.o_proj(mixed.flatten(2))


def run_mlp(layer: ViTLayer, hidden_states: Tensor, scale: Tensor | None) -> Tensor:
    """The MLP half of a block with its residual; `scale` as in `run_attention`."""
    return _add(hidden_states, layer.dropout(layer.mlp(layer.layernorm_after(hidden_states))), scale)


def run_block(
    layer: ViTLayer,
    hidden_states: Tensor,
    attention_scale: Tensor | None,
    mlp_scale: Tensor | None,
    attention_mask: Tensor | None,
    hooked: bool,
    **kwargs: Any,
) -> Tensor:
    """Both halves, one after the other: without scales the stock block's arithmetic."""
    hidden_states = run_attention(layer, hidden_states, attention_scale, attention_mask, hooked, **kwargs)
    return run_mlp(layer, hidden_states, mlp_scale)


def _add(residual: Tensor, update: Tensor, scale: Tensor | None) -> Tensor:
    return update + residual if scale is None else torch.addcmul(residual, update, scale)


def on_kept_samples(half: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`half` computed for the samples that stochastic depth keeps only; the others pass by unchanged."""

    def run(layer: ViTLayer, hidden_states: Tensor, scale: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        # With no sample left all are computed, times zero: every parameter gets a gradient at every step.
        if scale is None or not len(rows := scale.flatten().nonzero().squeeze(1)):
            return half(layer, hidden_states, scale, *args, **kwargs)
        if args and args[0] is not None and len(args[0]) > 1:  # the attention mask of the attention half
            args = (args[0].index_select(0, rows), *args[1:])
        # index_select, because the backward of indexing with a tensor is several times slower
        kept = half(layer, hidden_states.index_select(0, rows), scale[rows], *args, **kwargs)
        return hidden_states[:, : kept.shape[1]].index_copy(0, rows, kept)

    return run


def run_kept_block(
    layer: ViTLayer,
    hidden_states: Tensor,
    attention_scale: Tensor | None,
    mlp_scale: Tensor | None,
    attention_mask: Tensor | None,
    hooked: bool,
    **kwargs: Any,
) -> Tensor:
    """`run_block` for the samples that stochastic depth keeps, in each half its own."""
    hidden_states = KEPT.attention(layer, hidden_states, attention_scale, attention_mask, hooked, **kwargs)
    return KEPT.mlp(layer, hidden_states, mlp_scale)


def run_observed_attention(
    layer: ViTLayer,
    hidden_states: Tensor,
    scale: Tensor | None,
    attention_mask: Tensor | None,
    needs: str,
    prefix: int,
    learns: bool,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """`run_attention`, and what a reducer `needs` of it: "cls_attention" (B, n) or "keys" (B, n, head width), fp32."""
    attention = layer.attention
    normed = layer.layernorm_before(hidden_states)
    query, key, value = _project(attention, normed)
    shown = (query, key) if learns else (query.detach(), key.detach())
    seen = seen_of_attention(needs, prefix, *shown, attention_mask, attention.scaling)
    if kwargs.get("output_attentions"):
        update, _ = attention(normed, attention_mask, **kwargs)  # transformers records from a hook on the module
    else:
        update = _attend(attention, query, key, value, attention_mask, **kwargs)
    return _add(hidden_states, layer.dropout(update), scale), seen


def _project(attention: ViTAttention, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (B, heads, T, head width)."""
    query, key, value = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
    return _heads(attention, query), _heads(attention, key), _heads(attention, value)


def run_pooled_attention(
    layer: ViTLayer,
    hidden_states: Tensor,
    scale: Tensor | None,
    attention_mask: Tensor | None,
    reduction: ReductionStep,
    **kwargs: Any,
) -> Tensor:
    """The attention half with tokens pooled inside it: (B, T, D) to (B, T', D)."""
    attention = layer.attention
    normed = layer.layernorm_before(hidden_states)
    if kwargs.get("output_attentions"):
        attention(normed, attention_mask, **kwargs)  # for the record only, which is of all tokens
    dropout = attention.attention_dropout if attention.training else 0.0
    mixed, residual = attend_pooled(
        *_project(attention, normed), attention_mask, attention.scaling, dropout, hidden_states, reduction
    )
    return _add(residual, layer.dropout(attention.o_proj(mixed)), scale)


PLAIN = BlockFunctions(run_attention, run_mlp, run_block, run_observed_attention)
KEPT = BlockFunctions(on_kept_samples(run_attention), on_kept_samples(run_mlp), run_kept_block, run_observed_attention)


def run_reduced(
    run: BlockFunctions,
    layer: ViTLayer,
    hidden_states: Tensor,
    attention_scale: Tensor | None,
    mlp_scale: Tensor | None,
    attention_mask: Tensor | None,
    hooked: bool,
    reduction: ReductionStep,
    **kwargs: Any,
) -> Tensor:
    """The whole block with `reduction` at its site; what decides and gathers stays outside of compiled code.

    Raises `ValueError` where the reducer needs attention and a map has taken its place.
    """
    seen = None
    looks = reduction.site == "attention" or reduction.needs != "nothing"
    if looks and not isinstance(layer.attention, ViTAttention):
        raise ValueError("token reduction at a block whose attention is replaced: there is none to decide from")
    if reduction.site == "attention":
        hidden_states = run_pooled_attention(
            layer, hidden_states, attention_scale, attention_mask, reduction, **kwargs
        )
    elif looks:
        hidden_states, seen = run.observed(
            layer, hidden_states, attention_scale, attention_mask,
            reduction.needs, reduction.prefix, reduction.learns, **kwargs,
        )  # fmt: skip
    else:
        hidden_states = run.attention(layer, hidden_states, attention_scale, attention_mask, hooked, **kwargs)
    if reduction.site == "middle":
        hidden_states = reduction(hidden_states, seen)
    hidden_states = run.mlp(layer, hidden_states, mlp_scale)
    return reduction(hidden_states, seen) if reduction.site == "after" else hidden_states


def check_key_bias(attention: nn.Module, attention_mask: Tensor | None) -> None:
    """Raise `ValueError` for a bias of the keys, which counts merged tokens by size, where the kernel takes none."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4 or attention_mask.shape[2] != 1:
        return
    if not isinstance(attention, ViTAttention) or not attention_mask.is_floating_point():
        return
    implementation = attention.config._attn_implementation
    if "flash" in implementation or "flex" in implementation:
        raise ValueError(
            f"attn_implementation {implementation!r} cannot count merged tokens by their size: "
            "give the reduction option proportional=false, or attn_implementation 'sdpa' or 'eager'"
        )
