# SPDX-License-Identifier: Apache-2.0
"""Original and compressed network side by side, on images that neither fitting nor choosing has seen."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..errors import InputError
from ..evaluation.classification import HeadAccuracy, head_accuracy, match_labels
from ..evaluation.knn import paired_bootstrap_interval
from ..evaluation.latency import compare_latency
from ..evaluation.linear_probe import probe_features
from ..evaluation.model_cost import macs, parameters
from .adapters import Adapter, module_forward
from .calibration import ImageReader
from .cost import OutputCost
from .report import number


LATENCY_ROUNDS = 30
# With fewer labelled images a class a re-trained head says nothing.
PROBE_IMAGES_PER_CLASS = 5


@dataclass(frozen=True)
class LabelledRows:
    """Images by row number with their labels, or labels None where the data set has none.

    `class_names` are those of the labels, where they have names.
    """

    reader: ImageReader
    rows: tuple[int, ...]
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Accuracy:
    """Top-1 of both networks as fractions, their difference (mean, low, high), the images; or the reason for none."""

    original: float | None
    compressed: float | None
    difference: tuple[float, float, float] | None
    images: int
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """What was measured; pairs are (original, compressed), triples (mean or median, low, high) with 95 % intervals.

    Attributes:
        images: how many were evaluated.
        device: the latency is that of one image there.
        parameters, macs, seconds, file_bytes: pairs; macs and seconds are of one image.
        latency_ratio: compressed / original, measured in turns.
        cost_name, cost: of the outputs, against the original's; the interval is a bootstrap over images.
        relative_error: of the outputs, squared.
        agreement: fraction of the images that both heads give the same class; None without a head.
        head: accuracy of the original head; None without one.
        retrained: accuracy of a linear head trained anew on frozen features; None without labels.
    """

    images: int
    device: str
    parameters: tuple[int, int]
    macs: tuple[int, int]
    seconds: tuple[float, float]
    file_bytes: tuple[int, int]
    latency_ratio: tuple[float, float, float]
    cost_name: str
    cost: tuple[float, float, float]
    relative_error: float
    agreement: float | None = None
    head: Accuracy | None = None
    retrained: Accuracy | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(quantity, original, compressed, change), as text for the terminal."""
        return [row[:4] for row in self.card_rows()]

    def card_rows(self) -> list[tuple[str, str, str, str, str]]:
        """(quantity, original, compressed, change, what it was measured on), as text."""
        kilo, mega, giga = 1e3, 1e6, 1e9
        images = f"{self.images:,} images" if self.images > 1 else "1 image"
        table = [
            (*_pair_row("parameters, M", self.parameters, mega), ""),
            (*_pair_row("FLOPs an image, G", (2 * self.macs[0], 2 * self.macs[1]), giga), ""),
            (*_pair_row("file, MB", self.file_bytes, mega), ""),
        ]
        ratio, low, high = self.latency_ratio
        original, compressed = (f"{kilo * value:.4g}" for value in self.seconds)
        change = f"x{ratio:.3f} [{low:.3f}, {high:.3f}]"
        latency = f"latency of one image, ms ({self.device})"
        table.append((latency, original, compressed, change, f"{LATENCY_ROUNDS} rounds"))
        cost, low, high = self.cost
        table.append((self.cost_name, "0", number(cost), f"[{number(low)}, {number(high)}]", images))
        if self.agreement is None:
            table.append(("relative squared error of the output", "0", number(self.relative_error), "", images))
        else:
            table.append(("same class as the original", "100 %", f"{100 * self.agreement:.1f} %", "", images))
        for name, accuracy in (("original head", self.head), ("re-trained linear head", self.retrained)):
            if accuracy is not None and accuracy.original is not None:
                table.append((f"top-1, {name}", *_accuracy_cells(accuracy), f"{accuracy.images:,} images"))
        return table


def compare(
    original: Adapter,
    compressed: Adapter,
    cost: OutputCost,
    evaluation: LabelledRows,
    training: LabelledRows,
    chunk_size: int = 32,
    seed: int = 0,
    progress: bool = True,
    file_bytes: tuple[int, int] = (0, 0),
) -> Comparison:
    """Measure everything; each image is read once and seen by both networks.

    Args:
        original, compressed: both networks, on one device.
        cost: as the plan was chosen by.
        evaluation: images to measure on.
        training: labelled images for the re-trained head.
        file_bytes: sizes of both files of weights.

    Raises:
        InputError: no image could be read.
    """
    sides = (original, compressed)
    seen = _outputs(sides, evaluation, chunk_size, "evaluation" if progress else None)
    costs = torch.cat([cost(*outputs) for outputs in zip(*seen.outputs)], dim=1)
    # a single image has no interval
    summary = _interval(costs[0], torch.zeros_like(costs[0]), seed)
    head = agreement = None
    if original.head == "classifier":
        head = _head_accuracy(original, [torch.cat(found).argmax(dim=1).cpu() for found in seen.outputs], seen, seed)
        agreement = head.agreement
    retrained = None
    if seen.labels is not None and training.labels is not None:
        retrained = _retrained(sides, training, seen, chunk_size, seed, progress)
    pixels = seen.first_image
    latency = compare_latency(
        lambda x: module_forward(original, x), lambda x: module_forward(compressed, x), pixels, LATENCY_ROUNDS
    )
    return Comparison(
        images=seen.count,
        device=str(pixels.device.type).upper(),
        parameters=(parameters(original.model), parameters(compressed.model)),
        macs=(macs(partial(module_forward, original), pixels), macs(partial(module_forward, compressed), pixels)),
        seconds=(latency.original, latency.compressed),
        file_bytes=file_bytes,
        latency_ratio=(*latency.ratio,),
        cost_name=cost.name,
        cost=summary,
        relative_error=costs[1].mean().item(),
        agreement=agreement,
        head=None if head is None else _as_accuracy(head),
        retrained=retrained,
    )


@dataclass(frozen=True)
class _Seen:
    """What both networks made of the images that could be read."""

    outputs: tuple[list[Tensor], list[Tensor]]
    features: tuple[Tensor, Tensor]
    labels: Tensor | None
    class_names: tuple[str, ...] | None
    count: int
    first_image: Tensor


@torch.inference_mode()
def _outputs(sides: Sequence[Adapter], images: LabelledRows, chunk_size: int, progress: str | None) -> _Seen:
    model = sides[0].model
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    features: tuple[list[Tensor], list[Tensor]] = ([], [])
    read: list[int] = []
    first = None
    for chunk in images.reader.chunks(images.rows, chunk_size, progress=progress):
        pixels = chunk.pixel_values.to(model.device, model.dtype)
        first = pixels[:1] if first is None else first
        read += chunk.indices
        for side, adapter in enumerate(sides):
            h, context = adapter.embed(pixels)
            for block in range(adapter.depth - 1):
                h = adapter.block(block, h, context)
            h = adapter.last_block(h, context)
            outputs[side].append(adapter.output(h))
            features[side].append(adapter.features(h).float().cpu())
    if first is None:
        raise InputError(f"--dataset_name_or_path: none of the {len(images.rows)} evaluation images can be read")
    labels = None
    if images.labels is not None:
        place = {row: position for position, row in enumerate(images.rows)}
        labels = images.labels[[place[row] for row in read]]
    return _Seen(
        outputs, (torch.cat(features[0]), torch.cat(features[1])), labels, images.class_names, len(read), first
    )


def _head_accuracy(original: Adapter, classes: list[Tensor], seen: _Seen, seed: int) -> HeadAccuracy:
    if seen.labels is None:
        agreement = (classes[0] == classes[1]).double().mean().item()
        return HeadAccuracy(None, None, None, agreement, seen.count, "the images have no labels")
    config: Any = original.model.config  # of a classifier, whose labels are not None
    match = match_labels(seen.labels, config.id2label, seen.class_names)
    return head_accuracy(classes[0], classes[1], match, config.num_labels, seed)


def _as_accuracy(head: HeadAccuracy) -> Accuracy:
    return Accuracy(head.original, head.compressed, head.difference, head.images, head.reason)


def _retrained(
    sides: Sequence[Adapter], training: LabelledRows, seen: _Seen, chunk_size: int, seed: int, progress: bool
) -> Accuracy:
    assert training.labels is not None and seen.labels is not None
    known = torch.unique(training.labels)
    tested = torch.isin(seen.labels, known)
    if len(known) < 2 or len(training.rows) < PROBE_IMAGES_PER_CLASS * len(known) or not tested.any():
        reason = (
            f"the {len(training.rows)} calibration images show {len(known)} classes; a head is re-trained from "
            f"{PROBE_IMAGES_PER_CLASS} images a class on, and at least 2 classes"
        )
        return Accuracy(None, None, None, 0, reason)
    fitted = _outputs(sides, training, chunk_size, "features" if progress else None)
    assert fitted.labels is not None  # those of `training`
    hits = [
        probe_features(
            fitted.features[side], fitted.labels, seen.features[side][tested], seen.labels[tested], seed=seed
        ).hits
        for side in (0, 1)
    ]
    before, after = (found.double() for found in hits)
    return Accuracy(before.mean().item(), after.mean().item(), _interval(after, before, seed), int(tested.sum()))


def _interval(a: Tensor, b: Tensor, seed: int) -> tuple[float, float, float]:
    if len(a) < 2:
        mean = (a - b).mean().item()
        return mean, mean, mean
    return paired_bootstrap_interval(a, b, seed)


def labels_of(rows: Dataset, column: str | None, indices: Sequence[int]) -> Tensor | None:
    """(N,) labels of some rows, None without a column of labels or where one has none."""
    if column is None:
        return None
    found = rows.select_columns([column])[list(indices)][column]
    if any(label is None or label < 0 for label in found):
        return None
    return torch.tensor(found)


def _pair_row(name: str, pair: tuple[float, float], unit: float) -> tuple[str, str, str, str]:
    change = f"{100 * (pair[1] / pair[0] - 1):+.1f} %" if pair[0] else ""
    return name, f"{pair[0] / unit:.4g}", f"{pair[1] / unit:.4g}", change


def _accuracy_cells(accuracy: Accuracy) -> tuple[str, str, str]:
    assert accuracy.original is not None and accuracy.compressed is not None
    change = f"{100 * (accuracy.compressed - accuracy.original):+.1f} points"
    if accuracy.difference is not None:
        change += f" [{100 * accuracy.difference[1]:+.1f}, {100 * accuracy.difference[2]:+.1f}]"
    return f"{100 * accuracy.original:.1f} %", f"{100 * accuracy.compressed:.1f} %", change
