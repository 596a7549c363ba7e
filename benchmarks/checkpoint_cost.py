# SPDX-License-Identifier: Apache-2.0
"""What share of a training's time do its checkpoints take?

Trains a few steps, saves a few checkpoints, and divides the seconds of one by those of the steps between two. The
parts of a save are timed inside the save itself.

    python benchmarks/checkpoint_cost.py
    python benchmarks/checkpoint_cost.py --architecture vit_small --batch 64 --device cuda --bf16
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


# Idle threads must sleep: a spinning one would be counted as work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from _engine import VALUES, Setting, build_engine, random_crops  # noqa: E402
from _measure import emit, header  # noqa: E402

from hf_simprune import atomic  # noqa: E402
from hf_simprune.dino import checkpoint  # noqa: E402
from hf_simprune.dino.arguments import DinoArguments  # noqa: E402
from hf_simprune.dino.engine import DinoEngine, Views  # noqa: E402


DEFAULTS = {field: DinoArguments.__dataclass_fields__[field].default for field in ("save_steps", "save_total_limit")}
LIMIT = 0.02


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="vit_tiny")
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--local_crops_number", type=int, default=8)
    parser.add_argument("--keep_rate", type=float, default=0.7)
    parser.add_argument("--save_steps", type=int, default=DEFAULTS["save_steps"])
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--saves", type=int, default=4, help="timed, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--folder", help="where to write; the disk matters (default: the current folder)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file to write all numbers to")
    return parser.parse_args()


def timed(call: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


@contextmanager
def watching(parts: dict[str, float]) -> Iterator[None]:
    """Adds the seconds that a save spends in each of its parts to `parts`."""
    places = {"write": (checkpoint, "save_file"), "checksum": (checkpoint, "write_manifest")}
    places |= {"fsync": (atomic, "flush_tree"), "remove the oldest": (checkpoint, "remove_folder")}
    plain = {name: getattr(*place) for name, place in places.items()}

    def watched(name: str) -> Callable[..., None]:
        def call(*args: Any) -> None:
            parts[name] = parts.get(name, 0.0) + timed(lambda: plain[name](*args))

        return call

    for name, place in places.items():
        setattr(*place, watched(name))
    try:
        yield
    finally:
        for name, place in places.items():
            setattr(*place, plain[name])


def save(engine: DinoEngine, folder: Path, step: int) -> dict[str, float]:
    """Seconds of one checkpoint, whole and by part."""
    parts: dict[str, float] = {}

    def whole() -> None:
        tensors: dict[str, Any] = {}
        parts["copy"] = timed(lambda: tensors.update(checkpoint.checkpoint_tensors(engine)))
        path = checkpoint.write_checkpoint(folder, tensors, {"step": step})
        checkpoint.rotate_checkpoints(folder, path, DEFAULTS["save_total_limit"])

    with watching(parts):
        return {"whole": timed(whole)} | parts


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    report: dict[str, Any] = header(device, args.seed)
    for key, value in report.items():
        print(f"{key}: {value}")
    setting = Setting(
        args.architecture, args.batch, args.local_crops_number, args.out_dim, 0.1, args.bf16, device, args.seed
    )
    crops, engine = random_crops(setting), build_engine(setting, args.keep_rate)
    local = torch.cat(crops[2:]) if len(crops) > 2 else None
    views = [Views(torch.cat(crops[:2]), local)]
    steps = [timed(lambda: engine.step(views, VALUES)) for _ in range(args.steps + 1)][1:]
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-cost-", dir=args.folder or "."))
    try:
        saves = [save(engine, folder, step) for step in range(1, args.saves + 2)][1:]
        size = sum(path.stat().st_size for path in next(folder.glob("checkpoint-*")).iterdir())
    finally:
        shutil.rmtree(folder)
    step = statistics.median(steps)
    cost = {name: statistics.median(each.get(name, 0.0) for each in saves) for name in saves[-1]}
    share = cost["whole"] / (cost["whole"] + args.save_steps * step)
    print(f"\n{args.architecture}, {args.out_dim} prototypes, batch {args.batch}")
    print(f"step: {step:.2f} s (median of {args.steps})")
    print(f"checkpoint of {size / 1e6:.0f} MB: {cost['whole']:.2f} s (median of {args.saves}), of which")
    for name, seconds in cost.items():
        if name != "whole":
            print(f"  {name:18} {seconds:6.2f} s")
    print(f"every {args.save_steps} steps: {share:.3%} of the time (wanted: below {LIMIT:.0%})")
    print(f"below {LIMIT:.0%} for steps of more than {cost['whole'] * (1 - LIMIT) / LIMIT / args.save_steps:.3f} s")
    report |= {"seconds_per_step": steps, "saves": saves, "bytes": size, "share": share}
    emit(report, args.json)


if __name__ == "__main__":
    main()
