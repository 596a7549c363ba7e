# SPDX-License-Identifier: Apache-2.0
"""What any supported network makes of images: the feature a classifier would read, and logits where it has one."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..rba.adapters import OWN_CONFIGS, Adapter, adapter_for, module_forward


class Outputs(NamedTuple):
    """`features` (B, D) fp32 of one batch, and `logits` (B, classes), None without a classification head."""

    features: Tensor
    logits: Tensor | None


class Network:
    """A network in eval mode, opened for evaluation.

    The feature is CLS after the final norm (SigLIP: the pooled token), as `hf_simprune.rba.adapters` has it; of a
    network that reduces tokens, CLS of its last hidden state, which is the same.

    Raises:
        InputError: a family that is not supported, or a model in training mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._adapter: Adapter | None = None
        reduces = isinstance(model.config, OWN_CONFIGS) and model.config.token_reduction is not None
        if not reduces:
            self._adapter = adapter_for(model)

    @property
    def has_head(self) -> bool:
        """Whether there are logits."""
        if self._adapter is not None:
            return self._adapter.head == "classifier"
        return self.model.base_model is not self.model and bool(self.model.config.num_labels)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) the network is made for."""
        if self._adapter is not None:
            return self._adapter.image_size
        size = self.model.config.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits, or the output of a network without a head: what latency and FLOPs are measured of."""
        if self._adapter is not None:
            return module_forward(self._adapter, pixel_values)
        found = self.model(pixel_values)
        return found.logits if self.has_head else found.last_hidden_state

    @torch.inference_mode()
    def outputs(self, pixel_values: Tensor) -> Outputs:
        """Features and logits of one batch (B, C, H, W), in one pass."""
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        if self._adapter is not None:
            return self._by_blocks(self._adapter, pixel_values)
        seen: list[Tensor] = []
        keep: Callable[..., None] = lambda *call: seen.append(call[-1].last_hidden_state)  # noqa: E731
        handle = self.model.base_model.register_forward_hook(keep)
        try:
            found = self.model(pixel_values)
        finally:
            handle.remove()
        return Outputs(seen[0][:, 0].float(), found.logits if self.has_head else None)

    def _by_blocks(self, adapter: Adapter, pixel_values: Tensor) -> Outputs:
        h, context = adapter.embed(pixel_values)
        for block in range(adapter.depth - 1):
            h = adapter.block(block, h, context)
        h = adapter.last_block(h, context)
        return Outputs(adapter.features(h).float(), adapter.output(h) if self.has_head else None)
