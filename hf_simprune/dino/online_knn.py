# SPDX-License-Identifier: Apache-2.0
"""k-NN accuracy of the teacher during training, on images as a user of the saved model would feed them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.decoding import DECODING_ERRORS
from ..errors import EvaluationError, InputError
from ..evaluation.features import extract_features
from ..evaluation.knn import knn_accuracy


HELD_OUT_SHARE = 0.1
_ASKED_EVERY = 8  # images, between two questions whether to stop


class _Stopped(Exception):
    """The images were no longer wanted."""


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

    def readable(self, position: int) -> Image.Image | None:
        """The image at a position of `rows`, or None where it cannot be read."""
        try:
            return self.image(self.rows[position])
        except DECODING_ERRORS:
            return None


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

    def __call__(self, step: int, stopped: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Fractions of the queries classified correctly: by the CLS token and by the mean patch token; how many
        queries those are; and, where there are any, how many images could not be read.

        None once `stopped()` says so: it is asked every few images, by all processes equally often, and must answer
        all of them the same.

        Raises:
            EvaluationError: too few images can be read.
        """
        try:
            bank, bank_labels = self._features(self.bank, stopped)
            queries, query_labels = self._features(self.queries, stopped)
        except _Stopped:
            return None
        if len(bank_labels) < self.k or len(query_labels) == 0:
            raise EvaluationError(
                f"of {len(self.bank)} images that vote {len(bank_labels)} can be read ({self.k} neighbours are asked "
                f"for), and of {len(self.queries)} to classify {len(query_labels)}"
            )
        names = {"knn_accuracy": "cls", "knn_accuracy_patch_mean": "patch_mean"}
        accuracies: dict[str, float] = {}
        for name, kind in names.items():
            here = queries[kind].to(self.accelerator.device)
            accuracies[name] = knn_accuracy(bank[kind], bank_labels, here, query_labels, self.k, self.temperature)
        unreadable = len(self.bank) + len(self.queries) - len(bank_labels) - len(query_labels)
        counts = {"knn_images": len(query_labels)} | ({"knn_unreadable": unreadable} if unreadable else {})
        return accuracies | counts

    def _features(self, images: LabelledImages, stopped: Callable[[], bool]) -> tuple[dict[str, Tensor], Tensor]:
        """Of all processes' shares, in the order of `images`, without those that cannot be read."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        share = range(rank, len(images), world)
        read: list[int] = []
        part: list[tuple[Tensor, dict[str, Tensor]]] = []
        stream = self._readable(images, share, -(-len(images) // world), read, stopped)
        first = next(stream, None)
        if first is not None:
            with self.accelerator.autocast():
                found = extract_features(
                    self.model, chain([first], stream), self.processor, self.batch_size, self.progress
                )
            part = [(torch.tensor(read), found)]
        parts = gather_object(part)
        if not parts:
            return {}, images.labels[:0]
        positions = torch.cat([where for where, _ in parts])
        order = positions.argsort()
        merged = {kind: torch.cat([found[kind] for _, found in parts])[order] for kind in parts[0][1]}
        return merged, images.labels[positions[order]]

    def _readable(
        self, images: LabelledImages, share: range, rounds: int, read: list[int], stopped: Callable[[], bool]
    ) -> Iterator[Image.Image]:
        """The images of a share that can be read; their positions are appended to `read`. Shares are up to `rounds`
        long."""
        for number in range(rounds):
            if number % _ASKED_EVERY == 0 and stopped():
                raise _Stopped
            image = images.readable(share[number]) if number < len(share) else None
            if image is not None:
                read.append(share[number])
                yield image
