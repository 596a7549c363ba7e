# SPDX-License-Identifier: Apache-2.0
"""k-NN accuracy of the teacher during training, on images as a user of the saved model would feed them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.decoding import DECODING_ERRORS
from ..errors import InputError
from ..evaluation.features import extract_features
from ..evaluation.knn import knn_accuracy


HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class LabelledImages:
    """Rows to classify or to vote: `image(row)` decodes one of `rows`, whose labels are (N,) int64."""

    image: Callable[[int], Image.Image]
    rows: Sequence[int]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, positions: Sequence[int]) -> "LabelledImages":
        """The images at these positions of `rows`."""
        return LabelledImages(self.image, [self.rows[i] for i in positions], self.labels[list(positions)])

    def readable(self, positions: list[int]) -> Iterator[Image.Image]:
        """The images that can be read; their positions in `rows` are appended to `positions`."""
        for position, row in enumerate(self.rows):
            try:
                image = self.image(row)
            except DECODING_ERRORS:
                continue
            positions.append(position)
            yield image


def hold_out(images: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    """Training images as (bank, queries) where there is no evaluation split: a tenth is classified by the others."""
    chosen = set(drawn(len(images), math.ceil(HELD_OUT_SHARE * len(images))))
    others = [position for position in range(len(images)) if position not in chosen]
    return images.subset(others), images.subset(sorted(chosen))


def drawn(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` positions, ascending, the same ones in every run.

    Drawn at random, as any regular choice can miss classes of a data set in which they take turns.
    """
    if limit is None or count <= limit:
        return list(range(count))
    generator = torch.Generator().manual_seed(0)
    return sorted(torch.randperm(count, generator=generator)[:limit].tolist())


class OnlineKnn:
    """Classifies `queries` by their nearest `bank` images in the teacher's feature space.

    Args:
        model: the teacher's backbone.
        processor: the image processor saved with the model.
        k, temperature: of DINO's weighted k-NN.
        accelerator: each process computes the features of its share; all classify all queries.

    Raises:
        InputError: the bank has fewer than `k` images.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        bank: LabelledImages,
        queries: LabelledImages,
        k: int,
        temperature: float,
        accelerator: Accelerator,
        batch_size: int = 128,
        progress: bool = True,
    ) -> None:
        if k > len(bank):
            raise InputError(
                f"--knn_k {k}: there are only {len(bank)} labelled images to choose neighbours from; use fewer of them"
            )
        self.model = model
        self.processor = processor
        self.bank = bank
        self.queries = queries
        self.k = k
        self.temperature = temperature
        self.accelerator = accelerator
        self.batch_size = batch_size
        self.progress = progress

    def __call__(self, step: int) -> dict[str, float]:
        """Fractions of the queries classified correctly, by the CLS token and by the mean patch token, and how many
        queries those are."""
        bank, bank_labels = self._features(self.bank)
        queries, query_labels = self._features(self.queries)
        names = {"knn_accuracy": "cls", "knn_accuracy_patch_mean": "patch_mean"}
        accuracies: dict[str, float] = {}
        for name, kind in names.items():
            here = queries[kind].to(self.accelerator.device)
            accuracies[name] = knn_accuracy(bank[kind], bank_labels, here, query_labels, self.k, self.temperature)
        return accuracies | {"knn_images": len(query_labels)}

    def _features(self, images: LabelledImages) -> tuple[dict[str, Tensor], Tensor]:
        """Of all processes' shares, in the order of `images`, without those that cannot be read."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        share = range(rank, len(images), world)
        read: list[int] = []
        part: list[tuple[Tensor, dict[str, Tensor]]] = []
        if len(share):
            stream = images.subset(share).readable(read)
            with self.accelerator.autocast():
                found = extract_features(self.model, stream, self.processor, self.batch_size, self.progress)
            part = [(torch.tensor([share[i] for i in read]), found)]
        parts = gather_object(part)
        positions = torch.cat([where for where, _ in parts])
        order = positions.argsort()
        merged = {kind: torch.cat([found[kind] for _, found in parts])[order] for kind in parts[0][1]}
        return merged, images.labels[positions[order]]
