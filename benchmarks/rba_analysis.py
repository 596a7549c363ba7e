# SPDX-License-Identifier: Apache-2.0
"""The papers' remaining questions about redundant blocks, in minutes on a CPU.

    python -W ignore benchmarks/rba_analysis.py --model CLASSIFIER --images IMAGENET_SAMPLE.parquet \
        --cifar CIFAR_TRAIN.parquet --flowers FLOWERS.parquet --json analysis.json

1. Which number, known before anything is replaced, tells what replacing a span costs? Spearman correlation over all
   spans of block redundancy, cosine, CKA, SVCCA, explained variance and the measured KL with KL and top-1 drop on test
   images (their Figures 6 and 7). Interval: the test images drawn again.
2. Do maps carry over? Fitted on ImageNet, CIFAR or flowers, applied to each other; rank correlation of the block
   redundancy of all spans between data sets (their Table 3).
3. Identity, linear, fold, mlp and res_mlp on a few spans over seeds, each with its own images, with the CPU seconds of
   fitting (their Tables 2 and 4). The moment pass that linear and fold share is reported by itself.

An interrupted run goes on where it stopped.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


# Idle threads must sleep, and every worker has one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from _measure import emit, header  # noqa: E402
from _rba import (  # noqa: E402
    DecodedImages,
    bootstrap,
    calibration_rows,
    load_network,
    logit_changes,
    rank_correlation,
    ratio_interval,
    read_table,
    run_plans,
    run_tasks,
    two_folds,
)

from hf_simprune.rba import CompressionPlan, Span, analyze  # noqa: E402
from hf_simprune.rba.calibration import CalibrationSet, ImageSplit  # noqa: E402
from hf_simprune.rba.maps import fit  # noqa: E402
from hf_simprune.rba.plan_maps import span_tokens  # noqa: E402
from hf_simprune.rba.trained_maps import fit_trained  # noqa: E402


METRICS = ("br_all", "br_cls", "cosine_all", "cosine_cls", "cka", "svcca", "explained_variance")
KINDS = ("identity", "linear", "fold", "mlp", "res_mlp")
CPU = torch.device("cpu")
Statistic = Callable[[np.ndarray], np.ndarray]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of an image classifier")
    parser.add_argument("--images", required=True, help="parquet of labelled images of the classifier's own classes")
    parser.add_argument("--cifar", help="parquet of other images, for question 2")
    parser.add_argument("--flowers", help="parquet of other images, for question 2")
    parser.add_argument("--folds", type=int, default=2, choices=(1, 2), help="of question 1")
    parser.add_argument("--seeds", type=int, default=3, help="of question 3")
    parser.add_argument("--cost_images", type=int, default=64, help="that the measured KL of question 1 looks at")
    parser.add_argument("--cross_images", type=int, default=200, help="fitted on in each set of question 2")
    parser.add_argument("--cross_test", type=int, default=100, help="test images of each set of question 2 at most")
    parser.add_argument(
        "--cross_lengths", type=int, nargs="+", default=[1, 2], help="blocks of the spans of question 2"
    )
    parser.add_argument("--spans", nargs="+", default=["4-5", "10-11", "8-11", "1-5"], help="of question 3")
    parser.add_argument("--steps", type=int, default=300, help="of training mlp and res_mlp")
    parser.add_argument("--limit", type=int, help="images at most, for a trial run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--parts", type=Path, default=Path("outputs/rba_analysis"), help="where finished tasks are kept"
    )
    parser.add_argument("--json", help="also write the numbers to this file")
    return parser.parse_args()


def load_images(args: argparse.Namespace, path: str, rows: int | None) -> tuple[Any, DecodedImages, torch.Tensor]:
    """Network, `rows` seeded rows of a file (all without a number) decoded, and their labels."""
    adapter, processor = load_network(args.model)
    table = read_table(path)
    chosen = np.random.default_rng(0).permutation(len(table.cells))[: args.limit][:rows].tolist()
    return adapter, DecodedImages([table.cells[row] for row in chosen], processor), table.labels[chosen]


def spans_task(args: argparse.Namespace, fold: int) -> dict[str, Any]:
    """Every span: what was known beforehand, and KL and hits of each test image once it is replaced."""
    adapter, reader, labels = load_images(args, args.images, None)
    folds = two_folds(list(range(len(labels))), 0)
    analysis = analyze(
        adapter.model,
        calibration_rows(reader, folds[fold]),
        kinds=("linear", "fold"),
        max_span=adapter.depth - 1,
        cost_images=args.cost_images,
        progress=False,
    )
    test = folds[1 - fold]
    records = [record for record in analysis.report.spans if record.start >= 1]
    plans = {}
    for record in records:
        for kind in ("linear", "fold"):
            span = Span(record.start, record.end, kind)
            plans[f"{kind}/{record.start}-{record.end}"] = CompressionPlan(adapter.depth, (span,)), analysis.maps
    found = run_plans(adapter, plans, reader, test, logit_changes(adapter))
    return {
        "spans": [(record.start, record.end) for record in records],
        "metrics": {name: [getattr(record, name) for record in records] for name in METRICS},
        "measured": {kind: [record.costs[kind] for record in records] for kind in ("linear", "fold")},
        "kl": {name: values[:, 0].tolist() for name, values in found.items()},
        "hits": {name: (values[:, 1] == labels[test]).int().tolist() for name, values in found.items()},
    }


def cross_task(args: argparse.Namespace) -> dict[str, Any]:
    """Maps of each set on the test images of every set, and the block redundancy that each set sees."""
    paths = {"imagenet": args.images, "cifar": args.cifar, "flowers": args.flowers}
    sets, redundancy, plans = {}, {}, {}
    for source, path in paths.items():
        if path is None:
            continue
        adapter, reader, _ = load_images(args, path, args.cross_images + args.cross_test)
        held = min(args.cross_test, len(reader) // 3)
        fitted, test = range(len(reader) - held), range(len(reader) - held, len(reader))
        sets[source] = adapter, reader, list(test)
        images = CalibrationSet(reader, ImageSplit(tuple(fitted)[: args.cross_images], tuple(test)[:1]))
        longest = max(args.cross_lengths)
        analysis = analyze(
            adapter.model, images, kinds=("linear", "fold"), max_span=longest, cost_images=1, progress=False
        )
        spans = [record for record in analysis.report.spans if record.start >= 1]
        redundancy[source] = {name: [getattr(record, name) for record in spans] for name in ("br_all", "br_cls")}
        for span in analysis.maps:
            if span.end - span.start in args.cross_lengths:
                name = f"{source}/{span.map}/{span.start}-{span.end}"
                plans[name] = CompressionPlan(adapter.depth, (span,)), analysis.maps
    kl: dict[str, dict[str, list[float]]] = {}
    for target, (adapter, reader, test) in sets.items():
        found = run_plans(adapter, plans, reader, test, logit_changes(adapter))
        for source in sets:
            for kind in ("linear", "fold"):
                mine = [values[:, 0] for name, values in found.items() if name.startswith(f"{source}/{kind}/")]
                kl.setdefault(f"{source}/{kind}", {})[target] = torch.stack(mine).mean(dim=0).tolist()
    return {"kl": kl, "redundancy": redundancy}


def kinds_task(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All kinds of map on the given spans, fitted on half of the images and tested on the other."""
    adapter, reader, labels = load_images(args, args.images, None)
    half, test = two_folds(list(range(len(labels))), 100 + seed)
    images = CalibrationSet(reader, ImageSplit(tuple(half), (half[0],)), seed)
    spans = [tuple(map(int, text.split("-"))) for text in args.spans]
    longest = max(end - start for start, end in spans)
    analysis = analyze(
        adapter.model, images, kinds=("linear", "fold"), max_span=longest, cost_images=1, progress=False
    )
    plans, times = {}, {}
    for start, end in spans:
        tokens = None
        for kind in KINDS:
            span, fitted = Span(start, end, kind), {}
            if kind in ("mlp", "res_mlp") and tokens is None:
                tokens = span_tokens(analysis.bench, span, seed)
            started = time.process_time()
            if kind in ("mlp", "res_mlp"):
                fitted[span] = fit_trained(kind, *tokens, steps=args.steps, seed=seed)
            else:
                fitted[span] = fit(span, analysis.moments)
            name = f"{kind}/{start}-{end}"
            times[name] = time.process_time() - started
            plans[name] = CompressionPlan(adapter.depth, (span,)), fitted
    found = run_plans(adapter, plans, reader, test, logit_changes(adapter))
    before = (found["original"][:, 1] == labels[test]).double().mean().item()
    return {
        "moments_seconds": analysis.report.seconds["moments"],
        "fit_seconds": times,
        "kl": {name: values[:, 0].mean().item() for name, values in found.items()},
        "drop": {
            name: 100 * (before - (values[:, 1] == labels[test]).double().mean().item())
            for name, values in found.items()
        },
    }


def task(args: argparse.Namespace, name: str) -> dict[str, Any]:
    kind, *number = name.split("-")
    return {"spans": spans_task, "cross": cross_task, "kinds": kinds_task}[kind](args, *map(int, number))


def correlations(parts: list[dict[str, Any]], longest: int | None = None) -> list[dict[str, Any]]:
    """Spearman of each number with what the spans cost on test images; mean over folds."""
    rows = []
    for kind in ("linear", "fold"):
        for target in ("kl", "drop"):
            for metric in (*METRICS, "measured"):
                values = [_correlation(part, kind, target, metric, longest) for part in parts]
                images = max(len(part["hits"]["original"]) for part in parts)
                low, high = bootstrap(partial(_mean_of, values), images, 0, 2000)
                middle = float(_mean_of(values, np.full((1, images), 1 / images))[0])
                rows.append({"map": kind, "with": target, "metric": metric, "rho": (middle, low, high)})
    return rows


def _mean_of(values: list[Statistic], weights: np.ndarray) -> np.ndarray:
    return np.mean([value(weights) for value in values], axis=0)


def _correlation(part: dict[str, Any], kind: str, target: str, metric: str, longest: int | None) -> Statistic:
    """From image weights (draws, images) to correlations (draws,); all signs such that 1 is a perfect guess."""
    keep = [n for n, (start, end) in enumerate(part["spans"]) if longest is None or end - start <= longest]
    known = np.array(part["measured"][kind] if metric == "measured" else part["metrics"][metric])[keep]
    known = known if metric == "measured" else -known
    names = [f"{kind}/{start}-{end}" for start, end in np.array(part["spans"])[keep]]
    if target == "kl":
        per_image = np.array([part["kl"][name] for name in names])
    else:
        per_image = np.array(part["hits"]["original"]) - np.array([part["hits"][name] for name in names])

    def value(weights: np.ndarray) -> np.ndarray:
        return rank_correlation(known, weights[:, : per_image.shape[1]] @ per_image.T)

    return value


def print_correlations(rows: list[dict[str, Any]], title: str) -> None:
    print(f"\n{title}")
    for kind in ("linear", "fold"):
        found = {(row["metric"], row["with"]): row["rho"] for row in rows if row["map"] == kind}
        print(f"  {kind:20} with KL                  with top-1 drop")
        for metric in (*METRICS, "measured"):
            texts = ["{:.3f} [{:.3f}, {:.3f}]".format(*found[metric, target]) for target in ("kl", "drop")]
            print(f"    {metric:18} {texts[0]:24} {texts[1]}")


def cross_report(result: dict[str, Any]) -> dict[str, Any]:
    """Mean KL of maps from each set on each set, and the ratio to the set's own maps."""
    print("\nMaps fitted on one set and applied to another: mean KL over spans (ratio to the set's own maps)")
    report: dict[str, Any] = {"kl": {}, "br": {}}
    sources = list(result["redundancy"])
    for kind in ("linear", "fold"):
        for source in sources:
            cells = []
            for target in sources:
                values, own = (np.array(result["kl"][f"{name}/{kind}"][target]) for name in (source, target))
                ratio = ratio_interval(values, own)
                report["kl"][f"{kind}: {source} on {target}"] = {"kl": float(values.mean()), "ratio": ratio}
                cells.append(f"{target} {values.mean():.3f} ({ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}])")
            print(f"  {kind:7} from {source:9} on {'  '.join(cells)}")
    for first in range(len(sources)):
        for second in range(first + 1, len(sources)):
            a, b = result["redundancy"][sources[first]], result["redundancy"][sources[second]]
            rho = {
                name: float(rank_correlation(np.array(a[name]), np.array(b[name]))) for name in ("br_all", "br_cls")
            }
            report["br"][f"{sources[first]}, {sources[second]}"] = rho
            texts = "  ".join(f"{name} {value:.3f}" for name, value in rho.items())
            print(f"  rank correlation of block redundancy, {sources[first]} and {sources[second]}: {texts}")
    return report


def kinds_report(parts: list[dict[str, Any]], spans: list[str]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds."""
    print(f"\nKinds of map, mean ± standard deviation over {len(parts)} seeds (fit: CPU seconds of one)")
    rows = []
    for span in spans:
        for kind in KINDS:
            name = f"{kind}/{span}"
            row: dict[str, Any] = {"span": span, "map": kind}
            for what in ("kl", "drop", "fit_seconds"):
                values = np.array([part[what][name] for part in parts])
                row[what] = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
            rows.append(row)
            print(
                f"  {span:6} {kind:9} KL {row['kl'][0]:.3f} ± {row['kl'][1]:.3f}   drop {row['drop'][0]:5.1f} ± "
                f"{row['drop'][1]:.1f} points   fit {row['fit_seconds'][0]:.2f} s"
            )
    moments = np.mean([part["moments_seconds"] for part in parts])
    print(f"  the moment pass that linear and fold of all spans share: {moments:.1f} s")
    return rows


def main() -> None:
    args = parse()
    folds, seeds = [f"spans-{fold}" for fold in range(args.folds)], [f"kinds-{seed}" for seed in range(args.seeds)]
    cross = ["cross"] if args.cifar or args.flowers else []
    results = run_tasks(task, args, [*folds, *cross, *seeds], args.parts, args.workers)
    report: dict[str, Any] = {"about": header(CPU, 0), "settings": {k: str(v) for k, v in vars(args).items()}}
    for title, longest in (("all spans", None), ("spans of up to 3 blocks", 3)):
        report[title] = correlations([results[name] for name in folds], longest)
        print_correlations(report[title], f"Rank correlation over {title} with what they cost on test images")
    if cross:
        report["cross"] = cross_report(results["cross"])
    if seeds:
        report["kinds"] = kinds_report([results[name] for name in seeds], args.spans)
    report["cpu_seconds"] = {name: result["cpu_seconds"] for name, result in results.items()}
    emit(report, args.json)


if __name__ == "__main__":
    main()
