# SPDX-License-Identifier: Apache-2.0
"""How good a network's frozen features are: weighted k-NN and a linear head, on labelled images.

Images are prepared by the network's own saved processor, so that the numbers are those a user of the model gets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.loading import find_label_column
from ..errors import InputError
from ..models.untrusted import reading
from ..rba.calibration import ImageReader
from ..rba.comparison import LabelledRows, labels_of
from .knn import TEMPERATURE, K, accuracy_interval, knn_predict
from .linear_probe import L2_GRID, probe_features
from .outputs import Network


@dataclass(frozen=True)
class FrozenResult:
    """Top-1 accuracy by frozen features.

    Attributes:
        accuracy: fraction of the test images classified correctly.
        interval: (low, high), its 95 % interval: the bootstrap's over test images, or Wilson's where all or none are
            classified correctly.
        predictions: (N,) labels given.
        hits: (N,) booleans, for paired comparisons of networks on the same images.
        train_images: labelled images that were learned from.
        settings: of the classifier.
    """

    accuracy: float
    interval: tuple[float, float]
    predictions: Tensor
    hits: Tensor
    train_images: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """What a network made of the images that could be read.

    Attributes:
        features: (N, D) fp32 on the CPU.
        classes: (N,) the head's classes, None without a head.
        labels: (N,) of the data set.
        first: (1, C, H, W) the pixels of the first image.
    """

    features: Tensor
    classes: Tensor | None
    labels: Tensor
    first: Tensor


def evaluate_knn(
    model: PreTrainedModel,
    train: Dataset | tuple[Sequence[Any], Sequence[int]],
    test: Dataset | tuple[Sequence[Any], Sequence[int]],
    *,
    processor: BaseImageProcessor | None = None,
    k: int = K,
    temperature: float = TEMPERATURE,
    image_column: str | None = None,
    label_column: str | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> FrozenResult:
    """Classify test images by their nearest training images in a network's feature space.

    The protocol is DINO's weighted k-NN (https://huggingface.co/papers/2104.14294); the feature is CLS after the final
    norm.

    Args:
        model: of a supported family, in eval mode, with or without a head; one that reduces tokens too.
        train, test: a data set with images and class numbers, or a pair of images (PIL, or uint8 (H, W, 3) arrays)
            and labels.
        processor: the model's image processor; read from where the model came from if left out.
        k, temperature: neighbours that vote, and the temperature of their weights.
        image_column, label_column: of a data set, where several would do.
        batch_size: images a forward pass.
        seed: of the bootstrap.
        progress: show bars on stderr.

    Raises:
        InputError: no images or labels, an unsupported network, no processor, `k` above the training images, or no
            class of the test images among the training images.
    """
    seen = _both(model, train, test, processor, image_column, label_column, batch_size, progress)
    return knn_result(*seen, k, temperature, seed)


def evaluate_linear(
    model: PreTrainedModel,
    train: Dataset | tuple[Sequence[Any], Sequence[int]],
    test: Dataset | tuple[Sequence[Any], Sequence[int]],
    *,
    processor: BaseImageProcessor | None = None,
    l2_grid: Sequence[float] = L2_GRID,
    image_column: str | None = None,
    label_column: str | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> FrozenResult:
    """Train a linear head on a network's frozen features and test it once.

    Multinomial logistic regression, solved to its optimum; its weight decay is the best of `l2_grid` on a fifth of the
    training images, see `hf_simprune.evaluation.linear_probe.probe_features`.

    Args:
        model, train, test, processor, image_column, label_column, batch_size, progress: as for `evaluate_knn`.
        l2_grid: weight decays to try.
        seed: of the fifth and of the bootstrap.

    Raises:
        InputError: as `evaluate_knn`, or training labels of one class only.
    """
    seen = _both(model, train, test, processor, image_column, label_column, batch_size, progress)
    return linear_result(*seen, l2_grid, seed)


def knn_result(bank: Seen, queries: Seen, k: int = K, temperature: float = TEMPERATURE, seed: int = 0) -> FrozenResult:
    """`evaluate_knn` of features at hand."""
    found = knn_predict(bank.features, bank.labels, queries.features, k, temperature)
    return _result(found, queries, bank, {"k": k, "temperature": temperature}, seed)


def linear_result(train: Seen, test: Seen, l2_grid: Sequence[float] = L2_GRID, seed: int = 0) -> FrozenResult:
    """`evaluate_linear` of features at hand."""
    probe = probe_features(train.features, train.labels, test.features, test.labels, l2_grid, seed)
    return FrozenResult(
        probe.accuracy, probe.interval, probe.predictions, probe.hits, len(train.labels), {"l2": probe.l2}
    )


def see(network: Network, images: LabelledRows, batch_size: int = 32, progress: str | None = None) -> Seen:
    """One pass over labelled images; those that cannot be read are left out.

    Args:
        progress: name of a bar on stderr.

    Raises:
        InputError: no labels, or no image that can be read.
    """
    if images.labels is None:
        raise InputError("--label_column: the images have no class labels, or not all of them; evaluation needs them")
    features: list[Tensor] = []
    classes: list[Tensor] = []
    read: list[int] = []
    first = None
    for chunk in images.reader.chunks(images.rows, batch_size, progress=progress):
        first = chunk.pixel_values[:1] if first is None else first
        found = network.outputs(chunk.pixel_values)
        features.append(found.features.cpu())
        if found.logits is not None:
            classes.append(found.logits.argmax(dim=1).cpu())
        read += chunk.indices
    if first is None:
        raise InputError(f"--dataset_name_or_path: none of {len(images.rows)} images can be read")
    place = {row: position for position, row in enumerate(images.rows)}
    labels = images.labels[[place[row] for row in read]]
    return Seen(torch.cat(features), torch.cat(classes) if classes else None, labels, first)


def known_classes(train: Seen, test: Seen) -> Tensor:
    """(N,) booleans of the test images: whether a training image shows the same class."""
    return torch.isin(test.labels, train.labels)


def _both(
    model: PreTrainedModel,
    train: Dataset | tuple[Sequence[Any], Sequence[int]],
    test: Dataset | tuple[Sequence[Any], Sequence[int]],
    processor: BaseImageProcessor | None,
    image_column: str | None,
    label_column: str | None,
    batch_size: int,
    progress: bool,
) -> tuple[Seen, Seen]:
    if processor is None:
        with reading(f"processor: none given and none found at {model.name_or_path!r}; give one"):
            processor = AutoImageProcessor.from_pretrained(model.name_or_path, backend="pil")
    network = Network(model)
    rows = [_labelled(images, processor, image_column, label_column) for images in (train, test)]
    names = ("training images", "test images") if progress else (None, None)
    seen = see(network, rows[0], batch_size, names[0]), see(network, rows[1], batch_size, names[1])
    if not known_classes(*seen).any():
        raise InputError("test: no training image shows a class of the test images, so none could be found")
    return seen


def _labelled(
    images: Dataset | tuple[Sequence[Any], Sequence[int]],
    processor: BaseImageProcessor,
    image_column: str | None,
    label_column: str | None,
) -> LabelledRows:
    if isinstance(images, tuple):
        pictures, labels = images
        if len(pictures) != len(labels):
            raise InputError(f"{len(pictures)} images with {len(labels)} labels: one label an image is needed")
        return LabelledRows(ImageReader(pictures, processor), tuple(range(len(labels))), torch.as_tensor(labels))
    reader = ImageReader(images, processor, image_column)
    rows = tuple(range(len(images)))
    return LabelledRows(reader, rows, labels_of(images, find_label_column(images.features, label_column), rows))


def _result(predictions: Tensor, test: Seen, train: Seen, settings: dict[str, Any], seed: int) -> FrozenResult:
    hits = predictions.cpu() == test.labels
    return FrozenResult(
        hits.double().mean().item(),
        accuracy_interval(hits, seed),
        predictions.cpu(),
        hits,
        len(train.labels),
        settings,
    )
