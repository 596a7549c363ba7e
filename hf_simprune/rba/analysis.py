# SPDX-License-Identifier: Apache-2.0
"""Analysis of one network on some images: moments in one pass, closed-form maps, measured costs of all candidates."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..errors import InputError
from .activations import Activations
from .adapters import Adapter, adapter_for, module_forward
from .calibration import CALIBRATION_IMAGES, CalibrationSet, calibration_set
from .candidates import candidate_items, check_settings, closed_form_kinds
from .cost import BANK_IMAGES, OutputCost
from .maps import FittedMaps, fit_all
from .measure import Bench, Measured, measure_items
from .moment_pass import fit_moments, sum_device
from .moments import MomentAccumulator, Moments
from .plan import Half, Span
from .redundancy import block_redundancy, cosine, explained_variance, linear_cka, svcca
from .replay import activations
from .report import HalfRecord, RedundancyReport, SpanRecord


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found.

    Attributes:
        report: everything to show and save.
        moments: of the fit images.
        maps: the closed-form map of every candidate.
        costs: what each candidate costs when it is the only change.
        bench: the network, its images and its cost function, for measuring more.
    """

    report: RedundancyReport
    moments: Moments
    maps: FittedMaps
    costs: dict[Span | Half, Measured]
    bench: Bench

    @property
    def adapter(self) -> Adapter:
        """The network."""
        return self.bench.adapter

    @property
    def images(self) -> CalibrationSet:
        """The images: `fit` made the maps, `select` the costs."""
        return self.bench.images


def analyze(
    model: PreTrainedModel,
    images: CalibrationSet | Dataset | Sequence[Any],
    *,
    processor: BaseImageProcessor | None = None,
    kinds: Sequence[str] = ("fold", "linear"),
    granularity: str = "block",
    max_span: int = 6,
    cost_images: int = 64,
    calibration_images: int = CALIBRATION_IMAGES,
    ridge: float = 1e-4,
    bias: bool = True,
    rank: int | None = None,
    seed: int = 0,
    chunk_size: int = 32,
    first_block: bool = False,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> Analysis:
    """Find out which blocks of a network are redundant on some images.

    One pass over the fit images accumulates second moments, from which follow block redundancy (RBA, arXiv
    2410.04941), cosine, CKA, SVCCA and explained variance of every span, and the closed-form maps of all candidates.
    Then each candidate is put in place and the change of the network's output measured on selection images.

    Args:
        model: of a supported family, in eval mode; it is not changed.
        images: a calibration set, or images to make one from (see `ImageReader`), all for fitting and selecting.
        processor: the model's image processor; read from where the model came from if left out.
        kinds: span maps to measure; trained kinds ("mlp", "res_mlp") are measured as "linear".
        granularity: "block", or "half" to measure halves of blocks too.
        max_span: longest span to measure, in blocks.
        cost_images: selection images to measure on, at most.
        calibration_images, seed: of `images` that are not a calibration set yet.
        ridge, bias: of the closed-form maps, see `fit_all`.
        rank: of "low_rank", an eighth of the width if left out.
        chunk_size: images at a time. Memory grows with it and with nothing else about the images.
        first_block: offer block 0 too.
        accelerator: shares the images among its processes; the result does not depend on their number.
        progress: show bars on stderr.

    Raises:
        InputError: bad options, an unsupported family, weights that are not finite, too few tokens, unreadable images.
    """
    adapter = adapter_for(model)
    measured_kinds = closed_form_kinds(kinds)
    check_settings(granularity, max_span, measured_kinds, rank, adapter.width)
    if "low_rank" in measured_kinds and rank is None:
        rank = max(1, adapter.width // 8)
    if cost_images < 1 or chunk_size < 1:
        raise InputError(f"--cost_images {cost_images}, --batch_size {chunk_size}: both at least 1")
    items = candidate_items(adapter, measured_kinds, granularity, max_span, rank, first_block)
    if not isinstance(images, CalibrationSet):
        images = calibration_set(images, processor or processor_of(model), calibration_images, seed=seed)
    check_finite_weights(model)
    _check_tokens(adapter, images)
    if accelerator is not None:
        model.to(accelerator.device)

    clock = _Clock()
    bench = Bench(adapter, images, OutputCost(), chunk_size, accelerator, progress)
    moments, cost = _moment_pass(bench, max_span, granularity == "half", "fold" in measured_kinds)
    clock.lap("moments")
    maps = fit_all(items, moments, ridge, bias)
    clock.lap("maps")
    spans = _metrics(moments, adapter.depth)
    clock.lap("metrics")
    bench = Bench(adapter, images, cost, chunk_size, accelerator, progress)
    costs = measure_items(bench, maps, images.select[:cost_images])
    clock.lap("costs")
    settings = {
        "kinds": list(measured_kinds),
        "granularity": granularity,
        "max_span": max_span,
        "cost_images": cost_images,
        "ridge": ridge,
        "bias": bias,
        "rank": rank,
        "first_block": first_block,
        "chunk_size": chunk_size,
    }
    report = RedundancyReport(
        model=model.name_or_path or type(model).__name__,
        family=adapter.family,
        depth=adapter.depth,
        width=adapter.width,
        cost_name=bench.cost.name,
        spans=tuple(_with_costs(span, costs) for span in spans),
        halves=_half_records(costs),
        images={**images.to_dict(), "cost": min(cost_images, len(images.select))},
        settings=settings,
        seconds=clock.seconds,
        plain_forward_seconds=_plain_forward_seconds(bench) * len(images.fit),
    )
    return Analysis(report, moments, maps, costs, bench)


def check_finite_weights(model: PreTrainedModel) -> None:
    """Raises InputError, naming the first parameter or buffer that holds NaN or infinity."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"model: its weight {name} holds NaN or infinity; every weight must be finite")


def processor_of(model: PreTrainedModel) -> BaseImageProcessor:
    """The image processor of where the model came from. Raises InputError where there is none."""
    try:
        return AutoImageProcessor.from_pretrained(model.name_or_path, backend="pil")
    except (OSError, ValueError) as error:
        raise InputError(f"processor: none given and none found at {model.name_or_path!r}; give one") from error


@torch.no_grad()
def _check_tokens(adapter: Adapter, images: CalibrationSet) -> None:
    blank = np.zeros((*adapter.image_size, 3), dtype=np.uint8)
    pixel_values = images.reader.prepare([blank]).to(adapter.model.device)
    tokens = adapter.embed(pixel_values)[0].shape[1]
    if tokens * len(images.fit) < adapter.width:
        raise InputError(
            f"--calibration_images: {len(images.fit)} images to fit on give {tokens * len(images.fit)} tokens, fewer "
            f"than the {adapter.width} features of a token; take more images"
        )


def _moment_pass(bench: Bench, max_span: int, halves: bool, fold: bool) -> tuple[Moments, OutputCost]:
    """Moments of the network as it is, and its cost: without a classifier, outputs for the first of the fit images."""
    adapter, images = bench.adapter, bench.images
    accumulator = MomentAccumulator(
        adapter.depth,
        adapter.width,
        max_span,
        ("linear", "fold") if fold else ("linear",),
        halves,
        prefix_tokens=adapter.num_prefix_tokens,
        full_halves=[adapter.halves(b) for b in range(adapter.depth)],
        device=sum_device(bench),
    )
    in_bank = set() if adapter.head == "classifier" else set(images.fit[:BANK_IMAGES])
    bank: list[tuple[int, Tensor]] = []

    def keep_outputs(indices: Sequence[int], found: Activations) -> None:
        if in_bank.intersection(indices):
            outputs = adapter.output(found.hidden[-1]).float().cpu()
            bank.extend((index, output) for index, output in zip(indices, outputs) if index in in_bank)

    def run(pixel_values: Tensor) -> Activations:
        return activations(adapter, pixel_values, halves=halves, fold=fold)

    moments = fit_moments(bench, accumulator, run, "moments", keep_outputs)
    if adapter.head == "classifier":
        return moments, OutputCost()
    by_index = dict(gather_object(bank) if bench.ranks[1] > 1 else bank)
    rows = tuple(index for index in images.fit if index in by_index)
    return moments, OutputCost(torch.stack([by_index[index] for index in rows]).to(adapter.model.device), rows)


def _metrics(moments: Moments, depth: int) -> list[SpanRecord]:
    matrices = {
        "br_cls": block_redundancy(moments, "cls"),
        "br_all": block_redundancy(moments, "all"),
        "cosine_cls": cosine(moments, "cls"),
        "cosine_all": cosine(moments, "all"),
        "cka": linear_cka(moments),
        "svcca": svcca(moments),
        "explained_variance": explained_variance(moments),
    }
    values: dict[str, Any] = {name: matrix.tolist() for name, matrix in matrices.items()}
    return [
        SpanRecord(i, j, **{name: matrix[i][j] for name, matrix in values.items()})
        for i in range(depth)
        for j in range(i + 1, depth + 1)
    ]


def _with_costs(span: SpanRecord, costs: dict[Span | Half, Measured]) -> SpanRecord:
    found = {
        item.map: measured.cost
        for item, measured in costs.items()
        if isinstance(item, Span) and (item.start, item.end) == (span.start, span.end)
    }
    return SpanRecord(**{**vars(span), "costs": found})


def _half_records(costs: dict[Span | Half, Measured]) -> tuple[HalfRecord, ...]:
    found: dict[tuple[int, str], dict[str, float]] = {}
    for item, measured in costs.items():
        if isinstance(item, Half):
            found.setdefault((item.block, item.half), {})[item.map] = measured.cost
    return tuple(HalfRecord(block, half, by_map) for (block, half), by_map in found.items())


@torch.no_grad()
def _plain_forward_seconds(bench: Bench) -> float:
    """Wall clock of the network as it is, per image, over one chunk."""
    indices = bench.images.select[: bench.chunk_size]
    for chunk in bench.images.chunks(indices, bench.chunk_size):
        pixel_values = chunk.pixel_values.to(bench.adapter.model.device)
        started = time.perf_counter()
        module_forward(bench.adapter, pixel_values).sum().item()
        return (time.perf_counter() - started) / len(chunk.indices)
    return math.nan


class _Clock:
    """Wall clock of one part after the other."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now, self.last, self.seconds = now, now(), dict[str, float]()

    def lap(self, part: str) -> None:
        self.seconds[part] = self.now() - self.last
        self.last = self.now()
