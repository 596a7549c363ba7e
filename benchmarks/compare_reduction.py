# SPDX-License-Identifier: Apache-2.0
"""Does pruning keep what DINO learns? The same training under every token reduction, judged on held-out images.

    python benchmarks/compare_reduction.py --config benchmarks/cifar10_micro.yaml \
        --train path/to/cifar10_train.parquet --test path/to/cifar10_test.parquet
    python benchmarks/compare_reduction.py --config benchmarks/curricula.yaml --train … --test …

All runs of a seed share initialisation, order and crops. Each is `recipes/train_dino.py` in a process of its own, on
whatever device is there; started again, the comparison leaves out what has finished and goes on with what was
interrupted. Measured on the test images: k-NN by the CLS token and by the mean patch token, and a linear head on CLS.

Written into the output folder: comparison.json, comparison.md and comparison.png. They hold accuracies (mean and
standard deviation over seeds), the share of a dense step's FLOPs (counted) and of its time (images a second in the
runs' logs), the peak memory of a run, every method's difference to dense, and, where the gate is passed (dense beats
the random network by 10 points and raw pixels by 3), its retained gain (x - random) / (dense - random). Intervals draw
the test images again, paired; they say nothing of other seeds.
"""

import json
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path


# Threads that sleep while they wait: runs side by side would slow each other down many times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from _comparison import COMPARISON_OPTIONS, ComparisonArguments, Run, plan_runs  # noqa: E402
from _comparison_judge import MEASURES, Judge  # noqa: E402
from _comparison_runs import flop_share, is_finished, measured, train_all  # noqa: E402
from _comparison_table import DENSE, PIXELS, RANDOM_NETWORK, Row, accuracy, compare, draw, markdown  # noqa: E402
from _measure import header  # noqa: E402

from hf_simprune.errors import InputError  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where a run failed, 2 for bad input, 130 when interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        args = COMPARISON_OPTIONS.parse(argv)
        runs = plan_runs(args, torch.cuda.is_available())
        failed = [] if args.table_only else train_all(runs, args.workers)
        finished = [run for run in runs if is_finished(run)]
        if any(run.variant.label == DENSE for run in finished):
            write_tables(args, finished, len(runs))
        else:
            print("no dense run has finished, so there is nothing to compare with")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    for run in failed:
        print(f"failed: {run.name}, see {run.folder}.log", file=sys.stderr)
    return 1 if failed else 0


def write_tables(args: ComparisonArguments, runs: Sequence[Run], planned: int) -> None:
    """Judge the finished runs and write comparison.json, .md and .png."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = Path(args.output_dir)
    judge = Judge(Path(args.train), Path(args.test), output / "judged", device)
    rows = build_rows(runs, judge)
    comparisons = {measure: compare(rows, measure) for measure in MEASURES}
    about = header(device, runs[0].seed)
    notes = describe(args, runs, planned, judge, about)
    text = markdown(rows, comparisons, MEASURES, notes)
    print(text)
    report = {"about": about, "notes": notes, "arguments": asdict(args), "comparisons": comparisons}
    report["rows"] = [row_as_json(row) for row in rows]
    (output / "comparison.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "comparison.md").write_text(text)
    title = f"{judge.test_images} test images, seeds {' '.join(map(str, sorted({run.seed for run in runs})))}"
    draw(rows, MEASURES, output / "comparison.png", title + (" (exploratory)" if device.type == "cpu" else ""))


def build_rows(runs: Sequence[Run], judge: Judge) -> list[Row]:
    """Baselines first, then every method over its finished seeds."""
    found = {run.name: measured(run) for run in runs}
    dense = {run.seed: run for run in runs if run.variant.label == DENSE}
    processor = runs[0].folder
    untrained = [
        judge.network(f"initial-seed{seed}", run.folder / "training" / "initial", processor)
        for seed, run in dense.items()
    ]
    rows = [Row(PIXELS, (), {name: hits[None] for name, hits in judge.pixels(processor).items()})]
    rows.append(Row(RANDOM_NETWORK, tuple(dense), _stacked(untrained)))
    for label in dict.fromkeys(run.variant.label for run in runs):
        own = [run for run in runs if run.variant.label == label]
        hits = _stacked([judge.network(run.name, run.folder, processor) for run in own])
        # a step's seconds are inverse to images a second; only runs of the same seed are compared
        times = [
            found[dense[run.seed].name]["images_per_second"] / found[run.name]["images_per_second"]
            for run in own
            if run.seed in dense
        ]
        rows.append(
            Row(
                label,
                tuple(run.seed for run in own),
                hits,
                flop_share(own[0]),
                statistics.mean(times) if times else None,
                max(found[run.name]["peak_bytes"] or 0 for run in own) or None,
                [{"name": run.name, **found[run.name]} for run in own],
            )
        )
    return rows


def describe(
    args: ComparisonArguments, runs: Sequence[Run], planned: int, judge: Judge, about: dict[str, object]
) -> list[str]:
    """The circumstances, in lines for the report."""
    seeds = sorted({run.seed for run in runs})
    kind = "GPU" if "gpu" in about else "CPU: exploratory"
    if len(seeds) < 3:
        kind += f", {len(seeds)} seed{'s' if len(seeds) > 1 else ''}, too few to tell methods a point or two apart"
    memory = "tensors on the GPU" if "gpu" in about else "the whole process"
    return [
        kind,
        f"{len(runs)} of {planned} runs finished; settings of {args.recipe}"
        + (f" with {', '.join(args.options)}" if args.options else ""),
        f"{len(judge.labels[0])} training images, {judge.test_images} test images",
        f"time: {args.workers} runs at a time; memory: {memory}",
        f"`{about['command']}`",
        f"{about['processor']}" + (f", {about['gpu']}" if "gpu" in about else ""),
        ", ".join(f"{name} {version}" for name, version in about["versions"].items()) + f", {about['date']}",
    ]


def row_as_json(row: Row) -> dict[str, object]:
    by_measure = {
        measure: dict(zip(("mean", "sd"), accuracy(hits)), by_seed=[100 * float(v) for v in hits.mean(axis=1)])
        for measure, hits in row.hits.items()
    }
    return {
        "label": row.label, "seeds": list(row.seeds), "accuracy": by_measure, "flop_share": row.flop_share,
        "time_share": row.time_share, "peak_bytes": row.peak_bytes, "runs": list(row.runs),
    }  # fmt: skip


def _stacked(hits: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {measure: np.stack([one[measure] for one in hits]) for measure in MEASURES}


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
