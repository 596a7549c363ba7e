# SPDX-License-Identifier: Apache-2.0
"""Where the last attention of a network looks."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..rba.adapters import Adapter
from .token_walk import grid_of


@torch.inference_mode()
def attention_map(adapter: Adapter, pixel_values: Tensor) -> np.ndarray:
    """The attention that CLS gives to every patch in the last block that has an attention, mean of its heads.

    Without a CLS token, the mean of what all patches give. What goes to prefix tokens is left out.

    Args:
        adapter: the network. While this runs it uses plain attention, whatever it uses otherwise: no other thread may
            run it meanwhile.
        pixel_values: (1, C, H, W), normalised.

    Returns:
        (rows, columns) floats that sum to 1; all equal where every attention was replaced by a map.
    """
    prefix = adapter.num_prefix_tokens
    with _plain_attention(adapter.tower):
        found = adapter.tower(pixel_values=pixel_values.to(adapter.model.device), output_attentions=True).attentions
    if not found:
        patches = adapter.embed(pixel_values.to(adapter.model.device))[0].shape[1] - prefix
        weights = torch.ones(patches)
    else:
        weights = found[-1][0].float().mean(0)
        weights = (weights[0] if prefix else weights.mean(0))[prefix:].cpu()
    rows, columns = grid_of(len(weights), pixel_values.shape[-2:])
    return (weights / weights.sum()).view(rows, columns).numpy()


@contextmanager
def _plain_attention(tower: PreTrainedModel) -> Iterator[None]:
    """Fused attention gives no weights."""
    usual = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.set_attn_implementation(usual)
