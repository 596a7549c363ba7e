# SPDX-License-Identifier: Apache-2.0
"""What the page asks: a model, some images, and the answers that are kept because they will be asked again."""

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from ..data.decoding import load_pixels, oriented_size
from ..errors import InputError
from ..evaluation.model_cost import macs, parameters
from ..evaluation.model_files import short_name
from ..pictures_rba import span_matrix
from ..rba.adapters import adapter_for, module_forward
from ..rba.analysis import Analysis, analyze
from ..rba.calibration import ImageReader, calibration_set
from ..rba.checkpoint import Checkpoint
from .redundancy_map import redundancy_of
from .removal import RemovalEffect, maps_for, plan_without, removal_effect
from .token_walk import DroppedTokens, TokenWalk, draw_views


EXAMPLES = 6
MEASURED_IMAGES = 64  # their tokens fit a fold of a few hundred features well enough to see what it does
_COST_IMAGES = 8
_CHANGE = "Mean squared change of CLS"
_LONGEST_SPAN = 4  # measured; longer ones are fitted when they are picked


@dataclass(frozen=True)
class TokenAnswer:
    """Both views to look at, (2, H, W, 3) floats in 0..1, and what became of their patches."""

    views: np.ndarray
    dropped: DroppedTokens


@dataclass(frozen=True)
class HeatMap:
    """(L, L) by first and last removed block, NaN where there is no value; low is redundant."""

    title: str
    matrix: np.ndarray
    images: int


class Explorer:
    """Answers for one model. Any thread may ask; the model runs for one at a time.

    Args:
        checkpoint: the model with its image processor.
        images: to choose from and to measure on: a data set with a column of images, PIL images or arrays, or None.
        timed_seconds: about how long a latency is measured.

    Raises:
        InputError: an unsupported family, or no images in the data set.
    """

    def __init__(
        self, checkpoint: Checkpoint, images: Dataset | Sequence[Any] | None = None, timed_seconds: float = 1.5
    ) -> None:
        self.adapter = adapter_for(checkpoint.model)
        self.processor = checkpoint.processor
        self.images = images
        self.analysis: Analysis | None = None
        self._timed_seconds = timed_seconds
        self._reader = ImageReader([np.zeros((1, 1, 3), np.uint8)] if images is None else images, checkpoint.processor)
        self._lock = threading.RLock()
        self._walk: tuple[tuple[bytes, int], TokenWalk, np.ndarray] | None = None
        self._redundancy: tuple[bytes, np.ndarray] | None = None

    @property
    def name(self) -> str:
        """The model's, without the folders before it or the owner."""
        model = self.adapter.model
        return Path(short_name(model.name_or_path or type(model).__name__)).name

    def facts(self) -> str:
        """One line about the model."""
        pixels = self.prepare(Image.new("RGB", (64, 64)))
        count = macs(lambda x: module_forward(self.adapter, x), pixels.to(self.adapter.model.dtype))
        size = "x".join(map(str, pixels.shape[-2:]))
        return (
            f"{self.adapter.family}, {self.adapter.depth} blocks of width {self.adapter.width}, "
            f"{parameters(self.adapter.model) / 1e6:.4g} M parameters, {2 * count / 1e9:.4g} GFLOPs for an image of "
            f"{size} pixels"
        )

    def examples(self, count: int = EXAMPLES) -> list[Image.Image]:
        """Up to that many images, evenly spread over the data set; those that cannot be read are left out."""
        found = (self._reader.pixels_or_none(row) for row in spread(self.number_of_images, count))
        return [Image.fromarray(pixels) for pixels in found if pixels is not None]

    @property
    def number_of_images(self) -> int:
        """Images to measure on."""
        return 0 if self.images is None else len(self._reader)

    def prepare(self, image: Image.Image) -> Tensor:
        """(1, C, H, W) as the model's processor makes it."""
        return self._reader.prepare([_pixels(image).numpy()])

    def seen(self, image: Image.Image) -> np.ndarray:
        """(H, W, 3) floats in 0..1: the image as the processor cuts it, without the normalisation."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in _normalisation(self.processor))
        return (self.prepare(image)[0] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()

    def tokens(
        self, image: Image.Image, seed: int, progress: float, keep_rate: float, matching: str = "one_way"
    ) -> TokenAnswer:
        """What becomes of the patches of two views of an image; see `TokenWalk`."""
        with self._lock:
            key = (_digest(image), seed)
            if self._walk is None or self._walk[0] != key:
                size = min(self.prepare(image).shape[-2:])
                mean, std = _normalisation(self.processor)
                crops, views = draw_views(_pixels(image), size, mean, std, seed)
                self._walk = (key, TokenWalk(self.adapter, crops.to(self.adapter.model.dtype)), views)
            _, walk, views = self._walk
            return TokenAnswer(views, walk.dropped(progress, keep_rate, matching))

    def redundancy(self, image: Image.Image | None) -> list[HeatMap]:
        """See `redundancy_of`: of the image, or of all that were measured, then with the measured costs of folds."""
        with self._lock:
            if self.analysis is not None:
                report = self.analysis.report
                change = span_matrix(report, lambda span: -span.br_cls)
                costs = span_matrix(report, lambda span: span.costs.get("fold", np.nan))
                return [
                    HeatMap(_CHANGE, change, report.images["fit"]),
                    HeatMap(f"Measured cost of a fold, {report.cost_name}", costs, report.images["cost"]),
                ]
            if image is None:
                return []
            if self._redundancy is None or self._redundancy[0] != _digest(image):
                self._redundancy = (_digest(image), redundancy_of(self.adapter, self.prepare(image)))
            return [HeatMap(_CHANGE, self._redundancy[1], 1)]

    def measure(self) -> None:
        """Analyse the model on up to 64 of the images, so that removed blocks can be folded into those before them.

        Raises:
            InputError: there are no images, or too few of them can be read.
        """
        if self.images is None:
            raise InputError("--dataset: none was given, so there is nothing to measure on")
        with self._lock:
            if self.analysis is None:
                chosen = calibration_set(self.images, self.processor, min(MEASURED_IMAGES, self.number_of_images))
                self.analysis = analyze(
                    self.adapter.model,
                    chosen,
                    kinds=("fold",),
                    max_span=_LONGEST_SPAN,
                    cost_images=_COST_IMAGES,
                    progress=False,
                )

    def remove(self, image: Image.Image, blocks: Collection[int], kind: str = "identity") -> RemovalEffect:
        """The network without some blocks beside the network as it is, on one image.

        Raises:
            InputError: blocks that cannot be removed that way.
        """
        with self._lock:
            plan = plan_without(self.adapter.depth, blocks, kind)
            maps = maps_for(plan, self.analysis)
            return removal_effect(self.adapter, plan, maps, self.prepare(image), self._timed_seconds)


def spread(rows: int, count: int) -> list[int]:
    """Up to `count` row numbers, evenly spread over `rows`."""
    return sorted({int(row) for row in np.linspace(0, rows - 1, min(rows, count))})


def _pixels(image: Image.Image) -> Tensor:
    return load_pixels(image, oriented_size(image)[2])


def _digest(image: Image.Image) -> bytes:
    return f"{image.size}{image.mode}".encode() + image.tobytes()


def _normalisation(processor: Any) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the processor, or those that change nothing."""
    if not processor.do_normalize:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return processor.image_mean, processor.image_std
