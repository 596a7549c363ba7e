# SPDX-License-Identifier: Apache-2.0
"""What a replacement costs: how far a network's output moves, image by image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, normalize


TEMPERATURE = 0.07
_LEFT_OUT = -1e4  # a logit whose share is 0, finite so that no difference of infinities arises
BANK_IMAGES = 256
KL_OF_LOGITS = "KL of the logits, nats"
KL_OF_SIMILARITIES = "KL of the similarities to other images, nats"


def kl_logits(reference: Tensor, output: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(output)) of logits (B, C), in nats: (B,) fp32."""
    target, log_q = log_softmax(reference.float(), dim=-1), log_softmax(output.float(), dim=-1)
    return kl_div(log_q, target, reduction="none", log_target=True).sum(dim=-1)


def kl_similarity(
    reference: Tensor, output: Tensor, bank: Tensor, temperature: float = TEMPERATURE, same: Tensor | None = None
) -> Tensor:
    """For networks without a classifier: KL between the similarities of two features to those of other images.

    The distributions are softmax(f . bankᵀ / temperature) with every feature scaled to length 1.

    Args:
        reference: (B, F), the original network's features.
        output: (B, F), those of the changed network for the same images.
        bank: (N, F), the original network's features of other images.
        same: (B, N), True where an image of the bank is the image itself, which is then left out.

    Returns:
        (B,) fp32, nats.
    """
    directions = normalize(bank.float(), dim=-1)

    def logits(features: Tensor) -> Tensor:
        found = normalize(features.float(), dim=-1) @ directions.T / temperature
        return found if same is None else found.masked_fill(same, _LEFT_OUT)

    return kl_logits(logits(reference), logits(output))


def relative_squared_error(reference: Tensor, output: Tensor) -> Tensor:
    """Squared distance of two outputs (B, C) over the squared length of the first: (B,) fp32."""
    reference = reference.float()
    return (output.float() - reference).square().sum(dim=-1) / reference.square().sum(dim=-1)


@dataclass(frozen=True)
class OutputCost:
    """The measured cost of one kind of network: KL of logits where there is a classifier, else of similarities.

    `bank` is None for a classifier, else (N, F), see `kl_similarity`; `bank_rows` are the row numbers of its images,
    where they may be met again.
    """

    bank: Tensor | None = None
    bank_rows: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """What the cost is, with its unit."""
        return KL_OF_LOGITS if self.bank is None else KL_OF_SIMILARITIES

    def __call__(self, reference: Tensor, output: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Cost and relative squared error of each image: (2, B) fp64 on the CPU.

        `rows` are the row numbers of the images in the data set of the bank: none is compared with itself.
        """
        if self.bank is None:
            cost = kl_logits(reference, output)
        else:
            same = None
            if rows is not None and self.bank_rows:
                mine, theirs = (torch.tensor(numbers, device=output.device) for numbers in (rows, self.bank_rows))
                same = mine[:, None] == theirs
            cost = kl_similarity(reference, output, self.bank, same=same)
        return torch.stack([cost, relative_squared_error(reference, output)]).double().cpu()
