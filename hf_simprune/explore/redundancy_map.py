# SPDX-License-Identifier: Apache-2.0
"""Block redundancy of every span of blocks, from a few images."""

import numpy as np
import torch
from torch import Tensor

from ..rba.activations import Activations
from ..rba.adapters import Adapter
from ..rba.replay import activations


@torch.inference_mode()
def redundancy_of(adapter: Adapter, pixel_values: Tensor) -> np.ndarray:
    """How much every span of blocks changes CLS: the mean squared difference of `hidden_states[i]` and `[j]`.

    That is minus the block redundancy of RBA (arXiv 2410.04941); 0 is the most redundant. Of a network without CLS the
    mean over its tokens is taken.

    Args:
        pixel_values: (B, C, H, W), normalised.

    Returns:
        (L, L) floats by first and last removed block; NaN below the diagonal.
    """
    found: Activations = activations(adapter, pixel_values.to(adapter.model.device))
    states = [state[:, :1] if adapter.num_prefix_tokens else state.mean(1, keepdim=True) for state in found.hidden]
    stacked = torch.stack([state.double().cpu() for state in states])
    matrix = np.full((adapter.depth, adapter.depth), np.nan)
    for start in range(adapter.depth):
        change = (stacked[start + 1 :] - stacked[start]).square().flatten(1).mean(1)
        matrix[start, start:] = change.numpy()
    return matrix
