# SPDX-License-Identifier: Apache-2.0
"""Does a pruned training step take the time its FLOPs promise?

Times the whole step (student, teacher, heads, matching, loss, AdamW, EMA) dense and with token reduction, one after
another in every round, and puts the ratio of their times beside the ratio of their FLOPs.

    python benchmarks/train_step.py --architecture vit_tiny
    python benchmarks/train_step.py --architecture vit_tiny --reduction tome --reduction_options proportional=false
    python benchmarks/train_step.py --architecture vit_small --device cuda --bf16 --batch 128
"""

import argparse
import os
from typing import Any


# Idle threads must sleep: a spinning one would be counted as work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from _engine import (  # noqa: E402
    GLOBAL_SIZE,
    LOCAL_SIZE,
    Setting,
    build_benchmark_reducer,
    build_step,
    random_crops,
)
from _measure import (  # noqa: E402
    describe,
    emit,
    header,
    interleave,
    median_ratio,
    peak_bytes,
    peak_bytes_apart,
)

from hf_simprune.evaluation.profile import BackboneSpec, HeadSpec, step_flop_ratio  # noqa: E402
from hf_simprune.models.architectures import build_backbone  # noqa: E402
from hf_simprune.reduction import METHODS, parse_options  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="vit_tiny")
    parser.add_argument("--keep_rate", type=float, nargs="+", default=[0.8, 0.7])
    parser.add_argument("--reduction", default="simprune", choices=list(METHODS))
    parser.add_argument("--reduction_options", help="as in fuse=false")
    parser.add_argument("--local_crops_number", type=int, nargs="+", default=[0, 8], help="one table for each")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--drop_path_rate", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_memory", action="store_true", help="skip the peak memory, which needs a process a side")
    parser.add_argument("--json", help="file to write all numbers to")
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)
    return parser.parse_args()


def setting_of(args: argparse.Namespace, local_crops: int) -> Setting:
    return Setting(
        args.architecture, args.batch, local_crops, args.out_dim, args.drop_path_rate, args.bf16,
        torch.device(args.device), args.seed,
    )  # fmt: skip


def flop_ratio(args: argparse.Namespace, local_crops: int, keep_rate: float) -> float:
    config = build_backbone(args.architecture, GLOBAL_SIZE).config
    spec, method = BackboneSpec.from_config(config), parse_method(args)
    return step_flop_ratio(
        spec,
        spec.num_patches(GLOBAL_SIZE),
        build_benchmark_reducer(config, keep_rate, *method) or 1.0,
        num_local_patches=spec.num_patches(LOCAL_SIZE),
        num_local_crops=local_crops,
        head=HeadSpec(out_dim=args.out_dim),
    )


def parse_method(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    return args.reduction, parse_options(args.reduction, args.reduction_options)


def race(args: argparse.Namespace, local_crops: int) -> dict[str, object]:
    setting = setting_of(args, local_crops)
    crops = random_crops(setting)
    method = dict(zip(("reduction", "options"), parse_method(args), strict=True))
    sides = {str(rate): build_step(setting, crops, rate, **method) for rate in (1.0, *args.keep_rate)}
    times = interleave(sides, args.rounds, setting.device, warmup=2)
    peaks = {}
    if not args.no_memory:
        peaks = {name: peak_bytes_apart(f"{local_crops}:{name}") for name in sides}
    rows = []
    print(f"\n{args.architecture}, 2x{GLOBAL_SIZE}" + (f" + {local_crops}x{LOCAL_SIZE}" if local_crops else ""))
    for name, value in describe(times, setting.batch).items():
        print(f"  keep {name}: {value}" + (f", peak {peaks[name] / 2**20:.0f} MiB" if peaks else ""))
    for rate in args.keep_rate:
        name = str(rate)
        time_ratio, flops = median_ratio(times[name], times["1.0"]), flop_ratio(args, local_crops, rate)
        row = {"keep_rate": rate, "time_ratio": time_ratio, "flop_ratio": flops}
        line = f"  keep {rate} / dense: time {time_ratio}, FLOPs {flops:.3f}, gap {time_ratio.median - flops:+.3f}"
        if peaks:
            row["memory_ratio"] = peaks[name] / peaks["1.0"]
            line += f", memory {row['memory_ratio']:.3f}"
        rows.append(row)
        print(line, flush=True)
    return {
        "reduction": args.reduction,
        "local_crops_number": local_crops,
        "seconds": times,
        "peak_bytes": peaks,
        "rows": rows,
    }


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.peak_of:
        local_crops, rate = args.peak_of.split(":")
        setting = setting_of(args, int(local_crops))
        name, options = parse_method(args)
        step = build_step(setting, random_crops(setting), float(rate), reduction=name, options=options)
        for _ in range(3):
            step()
        print(peak_bytes(device))
        return
    report = header(device, args.seed)
    for key, value in report.items():
        print(f"{key}: {value}")
    report["races"] = [race(args, count) for count in args.local_crops_number]
    emit(report, args.json)


if __name__ == "__main__":
    main()
