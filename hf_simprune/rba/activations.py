# SPDX-License-Identifier: Apache-2.0
"""What one forward pass of a chunk of images leaves for the moments."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Activations:
    """Activations of one chunk of images, each of shape (images, tokens, width), in the model's dtype.

    `hidden[i]`, i = 0..depth, is the input of block i (i < depth) and the output of block i-1 (i > 0), before any
    final norm. The other lists have one entry a block, or are None where they were not asked for. An entry is None
    where the block holds no such half in full.

    - `an`: layernormed input of the attention half; `a`: what that half adds to the residual stream.
    - `mn`: layernormed input of the MLP half; `m`: what that half adds to the residual stream (LayerScale included).
    """

    hidden: list[Tensor]
    m: list[Tensor | None] | None = None
    an: list[Tensor | None] | None = None
    a: list[Tensor | None] | None = None
    mn: list[Tensor | None] | None = None
