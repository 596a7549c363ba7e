# SPDX-License-Identifier: Apache-2.0
"""k-NN accuracy of the teacher during training, on images as a user of the saved model would feed them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from ..errors import InputError
from ..evaluation.features import extract_features
from ..evaluation.knn import knn_accuracy
from .crops import DECODING_ERRORS


HOLD_OUT_EVERY = 10


@dataclass(frozen=True)
class LabelledImages:
    """Rows to classify or to vote: `image(row)` decodes one of `rows`, whose labels are (N,) int64."""

    image: Callable[[int], Image.Image]
    rows: Sequence[int]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def readable(self, positions: list[int]) -> Iterator[Image.Image]:
        """The images that can be read; their positions in `rows` are appended to `positions`."""
        for position, row in enumerate(self.rows):
            try:
                image = self.image(row)
            except DECODING_ERRORS:
                continue
            positions.append(position)
            yield image


def hold_out(rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """Training rows as (bank, queries) where there is no evaluation split: every tenth is classified by the others."""
    queries = list(rows)[::HOLD_OUT_EVERY]
    chosen = set(queries)
    return [row for row in rows if row not in chosen], queries


def spread_rows(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` rows, evenly spread, so that a sorted data set keeps all its classes."""
    if limit is None or count <= limit:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


class OnlineKnn:
    """Classifies `queries` by their nearest `bank` images in the teacher's feature space.

    Args:
        model: the teacher's backbone.
        processor: the image processor saved with the model.
        k, temperature: of DINO's weighted k-NN.

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
        batch_size: int = 128,
        progress: bool = True,
    ) -> None:
        if k > len(bank):
            raise InputError(f"--knn_k {k}: there are only {len(bank)} labelled images to choose neighbours from")
        self.model = model
        self.processor = processor
        self.bank = bank
        self.queries = queries
        self.k = k
        self.temperature = temperature
        self.batch_size = batch_size
        self.progress = progress

    def __call__(self, step: int) -> dict[str, float]:
        """Fractions of the queries classified correctly: by the CLS token and by the mean patch token."""
        bank, bank_labels = self._features(self.bank)
        queries, query_labels = self._features(self.queries)
        names = {"knn_accuracy": "cls", "knn_accuracy_patch_mean": "patch_mean"}
        return {
            name: knn_accuracy(bank[kind], bank_labels, queries[kind], query_labels, self.k, self.temperature)
            for name, kind in names.items()
        }

    def _features(self, images: LabelledImages) -> tuple[dict[str, Tensor], Tensor]:
        positions: list[int] = []
        features = extract_features(
            self.model, images.readable(positions), self.processor, self.batch_size, self.progress
        )
        return features, images.labels[positions]
