# SPDX-License-Identifier: Apache-2.0
"""Does a long run keep its memory, its files and its workers?

Trains a very small network on made-up images through the recipe, in a process of its own with loader workers, k-NN
evaluations, checkpoints and their rotation, and looks at the process from outside (Linux) once in every few steps.

    python benchmarks/long_run.py --json long_run.json
    python benchmarks/long_run.py --steps 100 --from_step 20   # only to see that it works
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from _measure import emit, header
from PIL import Image


RECIPE = Path(__file__).parents[1] / "recipes" / "train_dino.py"
OPTIONS = {
    "architecture": "vit_micro",
    "config_overrides": "hidden_size=24,num_hidden_layers=3,num_attention_heads=2,intermediate_size=48",
    "image_size": 16,
    "patch_size": 4,
    "local_crops_number": 2,
    "local_crop_size": 12,
    "reduction_layers": 1,
    "out_dim": 64,
    "head_hidden_dim": 16,
    "head_bottleneck_dim": 8,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "knn_k": 5,
    "report_to": "tensorboard",
}
QUANTITIES = ("rss_kib", "workers_rss_kib", "open_files", "processes", "threads", "folder_kib")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--from_step", type=int, default=200, help="where growth is counted from")
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two looks")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--knn_every", type=int, default=100)
    parser.add_argument("--save_steps", type=int, default=50)
    parser.add_argument("--streaming", action="store_true", help="read the images as a stream of four shards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file to write all numbers to")
    return parser.parse_args()


def write_images(folder: Path, count: int, seed: int, shards: int = 4) -> None:
    """Noise of 32 x 32 pixels in parquet files, with labels."""
    generator = np.random.default_rng(seed)
    folder.mkdir()
    for shard in range(shards):
        rows = range(shard, count, shards)
        images = []
        for _ in rows:
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, format="PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"image": images, "label": [row % 4 for row in rows]})
        pq.write_table(table, folder / f"train-{shard:05d}-of-{shards:05d}.parquet")


def command(args: argparse.Namespace, data: Path, output: Path) -> list[str]:
    options = OPTIONS | {
        "max_steps": args.steps, "knn_every": args.knn_every, "save_steps": args.save_steps, "seed": args.seed,
        "dataloader_num_workers": args.workers, "dataset_name_or_path": data, "output_dir": output,
        "disable_tqdm": True, "streaming": args.streaming, "logging_steps": 5,
    }  # fmt: skip
    return [sys.executable, "-W", "ignore", str(RECIPE), *(str(w) for k, v in options.items() for w in (f"--{k}", v))]


def status(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {"rss_kib": int(values["VmRSS"].split()[0]), "threads": int(values["Threads"])}


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def look(pid: int, output: Path) -> dict[str, float] | None:
    """The process and its children as they are now; None where one ended while it was looked at."""
    try:
        children = descendants(pid)
        here, others = status(pid), [status(child) for child in children]
        files = len(os.listdir(f"/proc/{pid}/fd"))
        log = (output / "metrics.jsonl").read_bytes().splitlines()
        size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        step = json.loads(log[-1])["step"]
    except (OSError, KeyError, IndexError, ValueError):
        return None
    return {
        "step": step, "rss_kib": here["rss_kib"], "workers_rss_kib": sum(other["rss_kib"] for other in others),
        "open_files": files, "processes": 1 + len(children), "threads": here["threads"], "folder_kib": size // 1024,
    }  # fmt: skip


def slope(looks: list[dict[str, float]], name: str) -> float:
    """Least squares, per 1,000 steps."""
    if len({each["step"] for each in looks}) < 2:
        return float("nan")
    steps, values = ([each[key] for each in looks] for key in ("step", name))
    return 1000 * statistics.linear_regression(steps, values).slope


def summary(looks: list[dict[str, float]], from_step: int, steps: int) -> dict[str, dict[str, float]]:
    """Of each quantity after `from_step`: least, most, medians of the first and last tenth of the steps, slope."""
    # with the last step the workers end, and the result is written
    late = [each for each in looks if from_step <= each["step"] < steps]
    tenth = max((steps - from_step) / 10, 1)
    found = {}
    for name in QUANTITIES:
        first = [each[name] for each in late if each["step"] <= from_step + tenth]
        last = [each[name] for each in late if each["step"] >= steps - tenth]
        values = [each[name] for each in late]
        if not (first and last):
            raise SystemExit("too few looks: take more steps, or look more often with --every")
        found[name] = {
            "least": min(values), "most": max(values), "first_tenth": statistics.median(first),
            "last_tenth": statistics.median(last), "per_1000_steps": slope(late, name),
        }  # fmt: skip
    return found


def main() -> None:
    args = parse()
    report: dict[str, Any] = header(torch.device("cpu"), args.seed)
    for key, value in report.items():
        print(f"{key}: {value}")
    with tempfile.TemporaryDirectory(prefix="long-run-") as folder:
        data, output = Path(folder) / "images", Path(folder) / "run"
        write_images(data, args.images, args.seed)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "ACCELERATE_USE_CPU": "true",
        }
        log = Path(folder) / "output.txt"
        started, looks = time.time(), []
        with log.open("w") as out:
            run = subprocess.Popen(command(args, data, output), stdout=out, stderr=out, env=environment)
            try:
                while run.poll() is None:
                    time.sleep(args.every)
                    looks.append(look(run.pid, output))
            finally:
                run.kill()
                run.wait()
        if run.returncode:
            raise SystemExit(f"the run ended with status {run.returncode}:\n{log.read_text()[-2000:]}")
        looks = [each for each in looks if each is not None]
        seconds = time.time() - started
    found = summary(looks, args.from_step, args.steps)
    print(f"\n{args.steps} steps in {seconds:.0f} s, {len(looks)} looks; after step {args.from_step}:")
    print(f"{'':16} {'least':>10} {'most':>10} {'first 10th':>11} {'last 10th':>10} {'per 1,000 steps':>16}")
    for name, row in found.items():
        print(
            f"{name:16} {row['least']:10,} {row['most']:10,} {row['first_tenth']:11,.0f} {row['last_tenth']:10,.0f} "
            f"{row['per_1000_steps']:+16,.1f}"
        )
    emit(report | {"seconds": seconds, "summary": found, "looks": looks}, args.json)


if __name__ == "__main__":
    main()
