# SPDX-License-Identifier: Apache-2.0
"""Is the search affordable, does memory stay flat, and is a compressed network as fast as it should be?

    python -W ignore benchmarks/rba_speed.py --model CLASSIFIER --images IMAGENET_SAMPLE.parquet \
        --many CIFAR_TRAIN.parquet --json speed.json

1. The moment pass over a plain forward pass of the same images, for linear maps, with folds, and with half blocks.
2. The whole analysis (default settings; with --half also of half blocks) over a plain forward pass of all images.
3. Peak memory of a fresh process that analyses few and many images of --many, decoded as they are needed.
4. Latency of compressed networks over that of the same blocks removed outright.

Images are decoded before the clock starts, except in 3. One thread unless --threads says otherwise.
"""

import argparse
import os
import statistics
import sys


# Idle threads must sleep: a spinning one would be counted as work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from _measure import emit, header, interleave, median_ratio, peak_bytes, peak_bytes_apart, seconds  # noqa: E402
from _rba import CHUNK, DecodedImages, calibration_rows, load_network, read_table  # noqa: E402

from hf_simprune.evaluation.latency import compare_latency, cpu_seconds, wall_seconds  # noqa: E402
from hf_simprune.rba import CompressionPlan, Span, analyze, convert  # noqa: E402
from hf_simprune.rba.adapters import Adapter  # noqa: E402
from hf_simprune.rba.maps import AffineMap, FittedMaps, IdentityMap  # noqa: E402
from hf_simprune.rba.moments import MomentAccumulator  # noqa: E402
from hf_simprune.rba.replay import activations  # noqa: E402


CPU = torch.device("cpu")
PASSES = {
    "linear": (False, ["linear"]),
    "linear and fold": (False, ["linear", "fold"]),
    "half": (True, ["linear", "fold"]),
}
ASKED = {"linear": 1.6, "linear and fold": 2.2}  # times a plain forward pass


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of an image classifier")
    parser.add_argument("--images", required=True, help="parquet of images")
    parser.add_argument("--many", help="parquet of many images, for 3")
    parser.add_argument("--pass_images", type=int, default=256, help="images of one pass in 1")
    parser.add_argument("--rounds", type=int, default=3, help="alternations of the passes in 1")
    parser.add_argument("--latency_rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="images of a batch in 4")
    parser.add_argument("--few_many", type=int, nargs=2, default=[200, 2000], help="numbers of images in 3")
    parser.add_argument("--max_span", type=int, default=6)
    parser.add_argument("--cost_images", type=int, default=64)
    parser.add_argument("--half", action="store_true", help="time the analysis of half blocks too")
    parser.add_argument("--limit", type=int, help="images at most, for a trial run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)
    parser.add_argument("--json", help="also write the numbers to this file")
    return parser.parse_args()


@torch.no_grad()
def plain_pass(adapter: Adapter, pixel_values: torch.Tensor) -> None:
    for batch in pixel_values.split(CHUNK):
        adapter.model(batch)


@torch.no_grad()
def moment_pass(adapter: Adapter, pixel_values: torch.Tensor, max_span: int, halves: bool, kinds: list[str]) -> None:
    """What `analyze` does with the fit images."""
    accumulator = MomentAccumulator(
        adapter.depth, adapter.width, max_span, kinds, halves, prefix_tokens=adapter.num_prefix_tokens
    )
    for number, batch in enumerate(pixel_values.split(CHUNK)):
        found = activations(adapter, batch, halves=halves, fold="fold" in kinds)
        if number == 0:
            accumulator.set_pilot(found)
        accumulator.update(found, torch.arange(len(batch)) * 2 // len(batch))
    accumulator.finish()


def pass_ratios(adapter: Adapter, pixel_values: torch.Tensor, args: argparse.Namespace) -> dict[str, object]:
    sides = {"plain forward": lambda: plain_pass(adapter, pixel_values)}
    for name, (halves, kinds) in PASSES.items():
        sides[name] = lambda h=halves, k=kinds: moment_pass(adapter, pixel_values, args.max_span, h, k)
    times = interleave(sides, args.rounds, CPU, warmup=0)
    report = {"images": len(pixel_values), "plain_cpu_seconds": statistics.median(times["plain forward"])}
    print(f"moment pass over a plain forward of the same {len(pixel_values)} images")
    for name in PASSES:
        ratio = median_ratio(times[name], times["plain forward"])
        report[name] = ratio
        asked = f", at most {ASKED[name]} asked" if name in ASKED else ""
        print(f"  {name:16} {ratio}{asked}", flush=True)
    return report


def analysis_ratios(adapter: Adapter, reader: DecodedImages, args: argparse.Namespace) -> dict[str, object]:
    images = calibration_rows(reader, range(len(reader)))
    plain = seconds(lambda: plain_pass(adapter, reader.pixel_values), CPU)
    report: dict[str, object] = {"images": len(reader), "plain_cpu_seconds": plain}
    print(f"analysis over a plain forward of all {len(reader)} images ({plain:.1f} CPU s)")
    for granularity in ("block", "half") if args.half else ("block",):
        found = []

        def run() -> None:
            found.append(
                analyze(
                    adapter.model,
                    images,
                    granularity=granularity,  # noqa: B023
                    max_span=args.max_span,
                    cost_images=args.cost_images,
                    progress=False,
                )
            )

        spent = seconds(run, CPU)
        parts = {part: round(value, 2) for part, value in found[0].report.seconds.items()}
        report[granularity] = {"ratio": spent / plain, "cpu_seconds": spent, "wall_seconds_of_parts": parts}
        asked = ", at most 6 asked" if granularity == "block" else ""
        print(f"  {granularity:6} {spent / plain:.2f}{asked} ({spent:.1f} CPU s; wall seconds of the parts: {parts})")
    return report


def peak_of(args: argparse.Namespace) -> None:
    """Analyse that many images in this process and print its peak memory."""
    adapter, processor = load_network(args.model)
    cells = read_table(args.many).cells
    analyze(
        adapter.model,
        cells,
        processor=processor,
        max_span=args.max_span,
        cost_images=args.cost_images,
        calibration_images=int(args.peak_of),
        progress=False,
    )
    print(peak_bytes(CPU))


def peaks(args: argparse.Namespace) -> dict[str, object]:
    few, many = args.few_many
    values = {count: peak_bytes_apart(str(count)) for count in (few, many)}
    for count, value in values.items():
        print(f"peak memory of analysing {count:5} images: {value / 2**20:.0f} MiB")
    print(f"  ratio {values[many] / values[few]:.3f}", flush=True)
    return {"bytes": values, "ratio": values[many] / values[few]}


def made_up_maps(plan: CompressionPlan, width: int) -> FittedMaps:
    """Maps of the right shape; what they hold does not change how long they take."""
    return {
        span: IdentityMap() if span.map == "identity" else AffineMap(torch.eye(width), torch.zeros(width))
        for span in plan.spans
    }


def latencies(adapter: Adapter, pixel_values: torch.Tensor, args: argparse.Namespace) -> dict[str, object]:
    depth, report = adapter.depth, {}
    print(f"latency over that of the same blocks removed outright, batch {args.batch}")
    for blocks in (1, 3):
        starts = [depth * (n + 1) // (blocks + 1) for n in range(blocks)]  # spread out, one block each

        def network(kind: str) -> torch.nn.Module:
            plan = CompressionPlan(depth, tuple(Span(start, start + 1, kind) for start in starts))  # noqa: B023
            return convert(adapter.model, plan, made_up_maps(plan, adapter.width))

        removed = network("identity")
        for kind in ("fold", "linear"):
            compressed, batch = network(kind), pixel_values[: args.batch]
            row = {}
            for unit, clock in (("CPU", cpu_seconds), ("wall", wall_seconds)):
                row[unit] = compare_latency(removed, compressed, batch, args.latency_rounds, clock=clock)
            whole = compare_latency(adapter.model, compressed, batch, args.latency_rounds, clock=cpu_seconds)
            report[f"{blocks} {kind}"] = {
                "over_removed": row["CPU"].ratio,
                "over_removed_wall": row["wall"].ratio,
                "over_original": whole.ratio,
            }
            print(
                f"  {blocks} blocks by {kind:6} {row['CPU'].ratio} (wall {row['wall'].ratio}); "
                f"over the original {whole.ratio}",
                flush=True,
            )
    return report


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        peak_of(args)
        return
    adapter, processor = load_network(args.model)
    reader = DecodedImages(read_table(args.images).cells[: args.limit], processor)
    report = {"about": header(CPU, 0)}
    report["latency"] = latencies(adapter, reader.pixel_values, args)
    report["moment_pass"] = pass_ratios(adapter, reader.pixel_values[: args.pass_images], args)
    report["analysis"] = analysis_ratios(adapter, reader, args)
    if args.many:
        report["memory"] = peaks(args)
    else:
        print("memory: not measured, --many names no file", file=sys.stderr)
    emit(report, args.json)


if __name__ == "__main__":
    main()
