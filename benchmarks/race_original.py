# SPDX-License-Identifier: Apache-2.0
"""Race a training step of this package against facebookresearch/dino's own, unedited, on the same tensors.

    pip install torch==2.13.0 && pip install --no-deps torchvision==0.28.0      # the original needs torchvision
    python -W ignore benchmarks/race_original.py --dino CHECKOUT --architecture vit_tiny

The checkout stays outside this repository. `_original.py` lists what of it is replaced from outside, and why.
Every side has a process of its own, and they take turns.
Printed: original time / our time; the same for two copies of the original, which should be 1; and how the gain splits
into plumbing (our dense step) and pruning (our pruned step over our dense one).
"""

import argparse
import os


# Idle threads must sleep: a spinning one would be counted as work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import _torchvision  # noqa: E402, F401, I001  (first: transformers imports it too)
import torch  # noqa: E402
from _engine import GLOBAL_SIZE, LOCAL_SIZE, Setting, build_step, random_crops  # noqa: E402
from _measure import (  # noqa: E402
    describe,
    emit,
    header,
    interleave_apart,
    median_ratio,
    peak_bytes,
    peak_bytes_apart,
    serve,
)
from _original import build_original_step  # noqa: E402


CLIP_GRAD = 3.0
ORIGINAL, COPY = "original", "copy of the original"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dino", required=True, help="a checkout of facebookresearch/dino")
    parser.add_argument("--architecture", default="vit_tiny", choices=["vit_tiny", "vit_small", "vit_base"])
    parser.add_argument("--keep_rate", type=float, nargs="+", default=[1.0, 0.7], help="1.0 is our dense step")
    parser.add_argument("--local_crops_number", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--drop_path_rate", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16 on both sides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_memory", action="store_true", help="skip the peak memory, which needs a process a side")
    parser.add_argument("--no_null", action="store_true", help="skip the copy of the original")
    parser.add_argument("--json", help="file to write all numbers to")
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser.parse_args()


def side_name(keep_rate: float) -> str:
    return "ours, dense" if keep_rate == 1.0 else f"ours, keep {keep_rate}"


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    setting = Setting(
        args.architecture, args.batch, args.local_crops_number, args.out_dim, args.drop_path_rate, args.bf16,
        torch.device(args.device), args.seed,
    )  # fmt: skip
    crops = random_crops(setting)
    makers = {ORIGINAL: lambda: build_original_step(args.dino, setting, crops, CLIP_GRAD)}
    if not args.no_null:
        makers[COPY] = makers[ORIGINAL]
    for rate in args.keep_rate:
        makers[side_name(rate)] = lambda rate=rate: build_step(setting, crops, rate, CLIP_GRAD)

    if args.peak_of:
        step = makers[args.peak_of]()
        for _ in range(3):
            step()
        print(peak_bytes(setting.device))
        return

    if args.serve:
        serve(makers[args.serve](), setting.device)
        return

    report = header(setting.device, args.seed)
    for key, value in report.items():
        print(f"{key}: {value}")
    print(f"{args.architecture}, 2x{GLOBAL_SIZE} + {args.local_crops_number}x{LOCAL_SIZE}, batch {args.batch}")
    report["seconds"] = times = interleave_apart(list(makers), args.rounds, setting.device, warmup=2)
    for name, value in describe(times, args.batch).items():
        print(f"  {name}: {value}")
    report["ratios"] = ratios = {
        name: median_ratio(times[ORIGINAL], times[name]) for name in times if name != ORIGINAL
    }
    for name, ratio in ratios.items():
        print(f"  original / {name}: {ratio}" + ("   (null test)" if name == COPY else ""))
    dense = side_name(1.0)
    if dense in times:
        report["pruning"] = {}
        print(f"  plumbing: {ratios[dense]}")
        for name in (side_name(rate) for rate in args.keep_rate if rate != 1.0):
            report["pruning"][name] = median_ratio(times[dense], times[name])
            print(f"  pruning, {name}: {report['pruning'][name]}")
    if not args.no_memory:
        report["peak_bytes"] = peaks = {name: peak_bytes_apart(name) for name in makers if name != COPY}
        for name, peak in peaks.items():
            print(f"  peak memory, {name}: {peak / 2**20:.0f} MiB, {peak / peaks[ORIGINAL]:.3f} of the original")
    emit(report, args.json)


if __name__ == "__main__":
    main()
