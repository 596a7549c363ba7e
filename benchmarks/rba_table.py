# SPDX-License-Identifier: Apache-2.0
"""What does removing 1 to 4 blocks cost, training-free and label-free, against the papers' contiguous span?

    python -W ignore benchmarks/rba_table.py --model CLASSIFIER --images IMAGENET_SAMPLE.parquet --json table.json \
        --cifar_train CIFAR_TRAIN.parquet --cifar_test CIFAR_TEST.parquet --flowers FLOWERS.parquet

Repeats of 2-fold on the images: calibrate on one half (two thirds of it fit, one third selects), test on the other,
and the reverse. Every number is averaged per image over the repeats; intervals draw the images again. Methods:

    fold          our plan, blocks folded away: a stock model
    fold+linear   our plan, the kind of map chosen for each span by measurement
    half          our plan of whole and half blocks that saves the MACs of folding that many blocks
    BR-all, BR-cls  RBA: the contiguous span of highest block redundancy (all tokens, CLS), linear map without bias or
                  ridge, fitted on the same images

With --cifar_train and --cifar_test or --flowers also the papers' protocol: calibrated on unlabelled train rows of that
set, a linear head trained on frozen features of the train rows. With --heal_steps the fold plans of the first repeat
are also distilled on unlabelled images, never test rows. An interrupted run goes on where it stopped.
"""

import argparse
import os
from pathlib import Path
from typing import Any


# Idle threads must sleep, and every worker has one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from _measure import emit, header  # noqa: E402
from _rba import (  # noqa: E402
    CHUNK,
    DecodedImages,
    Plans,
    calibration_rows,
    commonest,
    frozen_features,
    load_network,
    logit_changes,
    logit_look,
    mean_interval,
    paper_choice,
    ratio_interval,
    read_table,
    run_plans,
    run_tasks,
    two_folds,
)

from hf_simprune.evaluation.knn import paired_bootstrap_interval  # noqa: E402
from hf_simprune.evaluation.linear_probe import probe_features  # noqa: E402
from hf_simprune.rba import analyze, choose, convert  # noqa: E402
from hf_simprune.rba.adapters import Adapter  # noqa: E402
from hf_simprune.rba.analysis import Analysis  # noqa: E402
from hf_simprune.rba.calibration import CalibrationSet, ImageReader, ImageSplit  # noqa: E402
from hf_simprune.rba.choice import network_pieces, refit_choice  # noqa: E402
from hf_simprune.rba.heal import heal  # noqa: E402
from hf_simprune.rba.planner import Budget  # noqa: E402


GUIDE = {1: 2.0, 2: 6.0, 3: 18.0, 4: 25.0}  # points of top-1 that n blocks may cost
BR = ("BR-all", "BR-cls")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of an image classifier")
    parser.add_argument("--images", required=True, help="parquet of labelled images of the classifier's own classes")
    parser.add_argument("--cifar_train", help="parquet of labelled images, for the re-trained head")
    parser.add_argument("--cifar_test", help="the same of test images")
    parser.add_argument("--flowers", help="parquet of labelled images with a column split (train, test or val)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--half_repeats", type=int, default=1, help="repeats that plan half blocks too; 0 leaves it out"
    )
    parser.add_argument("--k", type=int, default=10, help="planned plans that are run before one is chosen")
    parser.add_argument("--swaps", action="store_true", help="improve every plan by local swaps; takes longer")
    parser.add_argument("--refit", action="store_true", help="rows with sequential refit where selection prefers it")
    parser.add_argument("--heal_steps", type=int, default=0, help="rows healed by that many steps of distillation")
    parser.add_argument("--heal_blocks", type=int, nargs="+", default=[3], help="of --blocks, those to heal")
    parser.add_argument("--cost_images", type=int, default=64)
    parser.add_argument("--probe_rows", type=int, default=2000, help="train and test rows of CIFAR at most")
    parser.add_argument("--limit", type=int, help="images at most, for a trial run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--parts", type=Path, default=Path("outputs/rba_table"), help="where finished tasks are kept")
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()
    if (args.cifar_train is None) != (args.cifar_test is None):
        parser.error("--cifar_train and --cifar_test go together")
    if args.heal_steps and not set(args.heal_blocks) <= set(args.blocks):
        parser.error("--heal_blocks must be among --blocks")
    return args


def our_plans(
    analysis: Analysis, args: argparse.Namespace, half: bool, kinds: tuple[str, ...] = ("fold", "fold+linear")
) -> Plans:
    """Our choices and the papers', by "method/blocks"."""
    pieces = network_pieces(analysis)
    plans: dict[str, Any] = {}
    for n in args.blocks:
        shared = {"pieces": pieces, "k": args.k, "refine": args.swaps}
        for kind in kinds:
            chosen = choose(analysis, Budget("blocks", n), kinds=kind.split("+"), granularity="block", **shared)
            plans[f"{kind}/{n}"] = chosen.plan, chosen.maps
            if args.refit:
                refitted, _ = refit_choice(analysis, chosen)
                plans[f"{kind} refit/{n}"] = refitted.plan, refitted.maps
        if half:
            chosen = choose(analysis, Budget("blocks", n), granularity="half", **shared)
            plans[f"half/{n}"] = chosen.plan, chosen.maps
        for method in BR:
            plans[f"{method}/{n}"] = paper_choice(analysis, n, method.removeprefix("BR-"))
    return plans


def analyse(adapter: Adapter, images: CalibrationSet, args: argparse.Namespace, half: bool = False) -> Analysis:
    return analyze(
        adapter.model,
        images,
        kinds=("fold", "linear"),
        granularity="half" if half else "block",
        max_span=max(args.blocks),  # no plan that removes so many blocks has a longer span
        cost_images=args.cost_images,
        progress=False,
    )


def fold_task(args: argparse.Namespace, repeat: int, fold: int) -> dict[str, Any]:
    """Per-image KL and hits of all methods on the fold that was not calibrated on."""
    adapter, processor = load_network(args.model)
    table = read_table(args.images)
    rows = list(range(len(table.cells)))[: args.limit]
    reader = DecodedImages([table.cells[row] for row in rows], processor)
    folds = two_folds(rows, repeat)
    analysis = analyse(adapter, calibration_rows(reader, folds[fold], repeat), args, repeat < args.half_repeats)
    plans = our_plans(analysis, args, repeat < args.half_repeats)
    test = folds[1 - fold]
    found = run_plans(adapter, plans, reader, test, logit_changes(adapter))
    if args.heal_steps and repeat == 0:
        found |= healed_changes(args, adapter, analysis, plans, reader.pixel_values[test])
    labels = table.labels[test].double()
    return {
        "rows": test,
        "plans": {name: str(plan) for name, (plan, _) in plans.items()},
        "kl": {name: values[:, 0].tolist() for name, values in found.items()},
        "hits": {name: (values[:, 1] == labels).int().tolist() for name, values in found.items()},
    }


def healed_changes(
    args: argparse.Namespace, adapter: Adapter, analysis: Analysis, plans: Plans, pixel_values: torch.Tensor
) -> dict[str, torch.Tensor]:
    """KL and class of each test image for fold plans distilled on the fit rows and train rows of the other sets."""
    table = read_table(args.images)
    cells = [table.cells[row] for row in analysis.images.fit]
    if args.flowers:
        flowers = read_table(args.flowers)
        cells += [flowers.cells[row] for row in flowers.rows("train")]
    if args.cifar_train:
        cifar = read_table(args.cifar_train).cells
        cells += [cifar[row] for row in seeded_rows(len(cifar), args.probe_rows)]
    reader = ImageReader(cells, analysis.images.reader.processor)
    images = CalibrationSet(reader, ImageSplit(tuple(range(len(cells))), ()))
    found = {}
    for n in args.heal_blocks:
        plan, maps = plans[f"fold/{n}"]
        student = convert(adapter.model, plan, maps)
        heal(student, adapter.model, images, args.heal_steps, plan=plan, progress=False)
        with torch.no_grad():
            looks = [
                logit_look(adapter.model(batch).logits, student(batch).logits) for batch in pixel_values.split(CHUNK)
            ]
        found[f"fold healed/{n}"] = torch.cat(looks)
    return found


def seeded_rows(rows: int, count: int) -> list[int]:
    return sorted(np.random.default_rng(0).permutation(rows)[:count].tolist())


def probe_task(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Hits of heads re-trained on frozen features, for every method on the same test rows."""
    adapter, processor = load_network(args.model)
    if name == "flowers":
        table = read_table(args.flowers)
        train, test = table.rows("train"), [row for row, part in enumerate(table.part) if part != "train"]
        cells, labels = table.cells, table.labels
    else:
        tables = read_table(args.cifar_train), read_table(args.cifar_test)
        cells, labels = tables[0].cells + tables[1].cells, torch.cat([table.labels for table in tables])
        train = seeded_rows(len(tables[0].cells), args.probe_rows)
        test = [len(tables[0].cells) + row for row in seeded_rows(len(tables[1].cells), args.probe_rows)]
    if args.limit:
        draw = np.random.default_rng(1)
        train, test = (sorted(draw.permutation(part)[: args.limit].tolist()) for part in (train, test))
    reader = ImageReader(cells, processor)
    calibration = calibration_rows(reader, train, 0)
    calibration = calibration_rows(reader, [*calibration.fit, *calibration.select][:500], 0)
    plans = our_plans(analyse(adapter, calibration, args), args, half=False, kinds=("fold",))
    features = run_plans(adapter, plans, reader, [*train, *test], frozen_features(adapter))
    hits = {}
    for method, values in features.items():
        probe = probe_features(values[: len(train)], labels[train], values[len(train) :], labels[test])
        hits[method] = probe.hits.int().tolist()
    return {"train": len(train), "plans": {key: str(plan) for key, (plan, _) in plans.items()}, "hits": hits}


def task(args: argparse.Namespace, name: str) -> dict[str, Any]:
    kind, *numbers = name.split("-")
    return fold_task(args, *map(int, numbers)) if kind == "fold" else probe_task(args, kind)


def per_image(parts: list[dict[str, Any]], what: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and the mean of each over the repeats that have it."""
    sums: dict[int, list[float]] = {}
    for part in parts:
        for row, value in zip(part["rows"], part[what].get(name, [])):
            sums.setdefault(row, []).append(value)
    rows = sorted(sums)
    return np.array(rows), np.array([np.mean(sums[row]) for row in rows])


def table_rows(parts: list[dict[str, Any]], blocks: list[int]) -> list[dict[str, Any]]:
    """One row a method and number of blocks. Differences and ratios use the folds in which the method was run."""
    rows = []
    for n in blocks:
        for name in dict.fromkeys(name for part in parts for name in part["kl"] if name.endswith(f"/{n}")):
            mine = [part for part in parts if name in part["kl"]]
            kl, hits, before = (
                per_image(mine, *key)[1] for key in (("kl", name), ("hits", name), ("hits", "original"))
            )
            drop = [100 * value for value in mean_interval(before - hits)]
            row = {"blocks": n, "method": name.split("/")[0], "folds": len(mine), "images": len(kl)}
            row |= {"top1": 100 * hits.mean(), "drop": drop, "kl": mean_interval(kl)}
            row["ratio"] = {br: ratio_interval(kl, per_image(mine, "kl", f"{br}/{n}")[1]) for br in BR}
            reference = f"fold/{n}"
            if name.startswith(("half", "fold")) and name != reference:
                row["ratio"]["fold"] = ratio_interval(kl, per_image(mine, "kl", reference)[1])
            if n in GUIDE:
                row |= {"guide": GUIDE[n], "fails": bool(drop[1] > GUIDE[n])}
            plans = [part["plans"][name] for part in mine if name in part["plans"]]
            row["plan"] = commonest(plans) if plans else ""
            rows.append(row)
    return rows


def show(values: Any, digits: int = 1) -> str:
    middle, low, high = values
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def print_rows(rows: list[dict[str, Any]], original: float) -> None:
    print(f"\nOriginal head: {original:.1f} % top-1. Drop in points, KL in nats, ratio of the mean KL to that of RBA.")
    columns = ("blocks", "method", "drop", "guide", "KL", "KL / BR-all", "KL / BR-cls", "KL / fold", "commonest plan")
    widths = (6, 17, 20, 11, 20, 20, 20, 20, 0)
    lines = [columns]
    for row in rows:
        guide = f"{row['guide']:g}{' FAILS' if row['fails'] else ''}" if "guide" in row else ""
        ratios = [show(row["ratio"][name], 3) if name in row["ratio"] else "" for name in (*BR, "fold")]
        lines.append(
            (str(row["blocks"]), row["method"], show(row["drop"]), guide, show(row["kl"], 3), *ratios, row["plan"])
        )
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def print_probe(name: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    before = torch.tensor(result["hits"]["original"])
    print(f"\nRe-trained head on {name}: {result['train']} train, {len(before)} test rows")
    print(f"  original         {100 * before.double().mean():.1f} %")
    rows = []
    for method, hits in result["hits"].items():
        if method == "original":
            continue
        after = torch.tensor(hits)
        drop = [100 * value for value in paired_bootstrap_interval(before, after, 0)]
        rows.append({"method": method, "accuracy": 100 * after.double().mean().item(), "drop": drop})
        print(f"  {method:15}  {rows[-1]['accuracy']:.1f} %  drop {show(drop)}  {result['plans'].get(method, '')}")
    return rows


def main() -> None:
    args = parse()
    probes = [name for name, path in (("cifar", args.cifar_train), ("flowers", args.flowers)) if path]
    folds = [f"fold-{repeat}-{fold}" for repeat in range(args.repeats) for fold in (0, 1)]
    # the longest first, so that no worker is left alone with it
    results = run_tasks(task, args, [*probes, *folds], args.parts, args.workers)
    parts = [results[name] for name in folds]
    rows = table_rows(parts, args.blocks)
    original = 100 * per_image(parts, "hits", "original")[1].mean()
    print_rows(rows, original)
    report = {"about": header(torch.device("cpu"), 0), "settings": {k: str(v) for k, v in vars(args).items()}}
    report |= {"original_top1": original, "rows": rows}
    report["probes"] = {name: print_probe(name, results[name]) for name in probes}
    report["cpu_seconds"] = {name: result["cpu_seconds"] for name, result in results.items()}
    emit(report, args.json)


if __name__ == "__main__":
    main()
