# SPDX-License-Identifier: Apache-2.0
"""What the RBA benchmarks share: images decoded once, folds, plans on test images, intervals, tasks side by side."""

import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from _intervals import bootstrap as bootstrap
from _intervals import mean_interval as mean_interval
from _intervals import ratio_interval as ratio_interval
from scipy.stats import rankdata
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.image_processing_utils import BaseImageProcessor

from hf_simprune.rba.adapters import Adapter, adapter_for
from hf_simprune.rba.analysis import Analysis
from hf_simprune.rba.calibration import CalibrationSet, Chunk, ImageReader, ImageSplit
from hf_simprune.rba.cost import kl_logits
from hf_simprune.rba.maps import FittedMaps, fit_all
from hf_simprune.rba.plan import CompressionPlan, Half, Span
from hf_simprune.rba.planner import br_plan
from hf_simprune.rba.replay import activations, replay


CHUNK = 32
_NOT_IN_RESULTS = ("json", "parts", "repeats", "workers")  # options that change no task's result
Plans = Mapping[str, tuple[CompressionPlan, FittedMaps]]
Look = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Table:
    """Rows of a parquet file: encoded images, labels (-1 where there are none), part ("" where there is no column)."""

    cells: list[bytes]
    labels: Tensor
    part: list[str]
    class_names: list[str] | None

    def rows(self, *parts: str) -> list[int]:
        """Numbers of the rows of these parts; of all rows where the file names no parts."""
        return [row for row, part in enumerate(self.part) if part in ("", *parts)]


def read_table(path: str | Path, image: str = "image") -> Table:
    """Read a parquet file whose column `image` holds encoded images; class names from the metadata key `info`."""
    table = pyarrow.parquet.read_table(path)
    info = json.loads((table.schema.metadata or {}).get(b"info", b"{}"))
    names = table.column_names
    labels = table["label"].to_pylist() if "label" in names else [-1] * len(table)
    part = table["split"].to_pylist() if "split" in names else [""] * len(table)
    return Table(table[image].to_pylist(), torch.tensor(labels), part, info.get("classes"))


class DecodedImages(ImageReader):
    """Images decoded and prepared once; a pass over them only slices memory.

    Args:
        size: (H, W) in place of the processor's own.
    """

    def __init__(
        self, cells: Sequence[bytes], processor: BaseImageProcessor, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(cells, processor)
        options = {} if size is None else {"size": {"height": size[0], "width": size[1]}}
        self.pixel_values = torch.cat([self.prepare([self.pixels(row)], **options) for row in range(len(cells))])

    def chunks(
        self,
        indices: Sequence[int],
        chunk_size: int = CHUNK,
        rank: int = 0,
        world: int = 1,
        progress: str | None = None,
    ) -> Iterator[Chunk]:
        for number in range(rank, -(-len(indices) // chunk_size), world):
            chosen = list(indices[number * chunk_size : (number + 1) * chunk_size])
            yield Chunk(number, tuple(chosen), self.pixel_values[chosen])


def load_network(folder: str) -> tuple[Adapter, BaseImageProcessor]:
    """A classifier with its own head, in eval mode, and its processor."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    return adapter_for(model), AutoImageProcessor.from_pretrained(folder, backend="pil")


def calibration_rows(reader: ImageReader, rows: Sequence[int], seed: int = 0) -> CalibrationSet:
    """`rows`, shuffled, as calibration images: two thirds fit, one third selects."""
    order = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()]
    fit = len(order) - len(order) // 3
    return CalibrationSet(reader, ImageSplit(tuple(order[:fit]), tuple(order[fit:])), seed)


def two_folds(rows: Sequence[int], repeat: int) -> tuple[list[int], list[int]]:
    """The rows in two halves, another pair each repeat."""
    order = np.random.default_rng(repeat).permutation(len(rows))
    shuffled = [rows[i] for i in order]
    return sorted(shuffled[: len(rows) // 2]), sorted(shuffled[len(rows) // 2 :])


def paper_choice(analysis: Analysis, blocks: int, tokens: str) -> tuple[CompressionPlan, FittedMaps]:
    """RBA's own way: the contiguous span with the highest block redundancy, and a linear map without bias or ridge."""
    redundancy = {
        (span.start, span.end): span.br_cls if tokens == "cls" else span.br_all for span in analysis.report.spans
    }
    plan = br_plan(analysis.adapter.depth, redundancy, blocks, "contiguous", map="linear")
    return plan, fit_all(plan.spans, analysis.moments, ridge=0.0, bias=False)


@torch.no_grad()
def run_plans(
    adapter: Adapter,
    plans: Plans,
    reader: ImageReader,
    rows: Sequence[int],
    look: Look,
) -> dict[str, Tensor]:
    """`look` at every image under every plan; the original's hidden states are shared up to a plan's first change.

    Args:
        look: of the original's `hidden_states[depth]` and the plan's to (B, …). The plan's may hold the first tokens
            only, as many as the output needs.

    Returns:
        (rows, …) by name of the plan, and "original" for the network as it is.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in ("original", *plans)}
    for chunk in reader.chunks(rows, CHUNK):
        hidden = activations(adapter, chunk.pixel_values).hidden
        _, context = adapter.embed(chunk.pixel_values)
        found["original"].append(look(hidden[-1], hidden[-1]))
        done: dict[tuple, Tensor] = {}
        for name, (plan, maps) in plans.items():
            key = (plan, *(id(maps[item]) for item in plan.items))  # the same plan found twice runs once
            if key not in done:
                start = min(map(_first_change, plan.items))
                done[key] = look(hidden[-1], replay(adapter, plan, maps, hidden[start], context, start))
            found[name].append(done[key])
    return {name: torch.cat(parts) for name, parts in found.items()}


def logit_look(before: Tensor, after: Tensor) -> Tensor:
    """KL of two logits (B, classes) and the class that the second give: (B, 2) fp64."""
    return torch.stack([kl_logits(before, after).double(), after.argmax(dim=1).double()], dim=1)


def logit_changes(adapter: Adapter) -> Look:
    """For `run_plans`: `logit_look` of the outputs."""
    return lambda original, changed: logit_look(adapter.output(original), adapter.output(changed))


def frozen_features(adapter: Adapter) -> Look:
    """For `run_plans`: the frozen feature, (B, F)."""
    return lambda original, changed: adapter.features(changed)


def _first_change(item: Span | Half) -> int:
    if isinstance(item, Half):
        return item.block
    return item.start - 1 if item.map == "fold" else item.start


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's, along the last axis; equal values share their mean rank."""
    a, b = (r - r.mean(axis=-1, keepdims=True) for r in (rankdata(a, axis=-1), rankdata(b, axis=-1)))
    return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def commonest(texts: Sequence[str]) -> str:
    """The most frequent text, and how often it occurs."""
    (text, count), *_ = Counter(texts).most_common(1)
    return f"{text} ({count} of {len(texts)})"


def run_tasks(
    work: Callable[[Any, str], dict[str, Any]], settings: Any, tasks: Sequence[str], folder: Path, workers: int
) -> dict[str, dict[str, Any]]:
    """Results of `work(settings, task)` for every task, computed `workers` at a time with one thread each.

    Each result is kept in `folder` as it comes; what is there from the same settings is not computed again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {name: value for name, value in vars(settings).items() if name not in _NOT_IN_RESULTS}
    known = json.loads(json.dumps(known, default=str))
    results = {}
    for task in tasks:
        part = folder / f"{task}.json"
        if part.exists() and (stored := json.loads(part.read_text()))["settings"] == known:
            results[task] = stored["result"]
    left = [task for task in tasks if task not in results]
    print(f"{len(tasks)} tasks, {len(left)} to do, {workers} at a time; kept in {folder}", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        started = time.time()
        futures = {pool.submit(_timed, work, settings, task): task for task in left}
        for future in as_completed(futures):
            task = futures[future]
            results[task] = future.result()
            (folder / f"{task}.json").write_text(json.dumps({"settings": known, "result": results[task]}))
            seconds = results[task]["cpu_seconds"]
            print(f"  {task}: {seconds:.0f} CPU s, {time.time() - started:.0f} s since the start", flush=True)
    return {task: results[task] for task in tasks}


def _timed(work: Callable[[Any, str], dict[str, Any]], settings: Any, task: str) -> dict[str, Any]:
    started = time.process_time()
    return {**work(settings, task), "cpu_seconds": round(time.process_time() - started, 1)}
