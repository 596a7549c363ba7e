# SPDX-License-Identifier: Apache-2.0
"""Does pruning keep what DINO learns? The same run dense, with SimPrune and with random dropping, judged by k-NN.

    python benchmarks/compare_reductions.py --config recipes/cifar10_vit_micro.yaml \
        --train path/to/cifar10_train.parquet --test path/to/cifar10_test.parquet --seeds 0

All runs of a seed share initialisation, order and crops. Each is `recipes/train_dino.py` in a process of its own;
an interrupted comparison goes on where it stopped when it is started again. Options after `--` go to every run.

Printed: k-NN accuracy on the test images of raw pixels, of the random network and of every run, by CLS token and by
mean patch token; the gate (dense beats random by 10 points and raw pixels by 3); and the retained gain
(x − random) / (dense − random) with a paired bootstrap interval over test images.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from _measure import header


RECIPE = Path(__file__).parents[1] / "recipes" / "train_dino.py"
GATE_RANDOM, GATE_PIXELS = 0.10, 0.03


def run(config: Path, train: Path, folder: Path, reduction: str, seed: int, extra: list[str]) -> float:
    """Train into `folder` unless that is done; returns the seconds it took this time."""
    state = folder / "training" / "run.json"
    if state.exists() and json.loads(state.read_text())["finished"]:
        return 0.0
    command = [sys.executable, str(RECIPE), "--config", str(config), "--dataset_name_or_path", str(train)]
    command += ["--output_dir", str(folder), "--token_reduction", reduction, "--seed", str(seed), *extra]
    if list(folder.glob("checkpoint-*")):
        command += ["--resume_from_checkpoint", "latest"]
    elif state.exists():
        command += ["--overwrite_output_dir"]
    print("$", " ".join(command), flush=True)
    started = time.time()
    subprocess.run(command, check=True)
    return time.time() - started


class Judge:
    """k-NN hits on the test images, one boolean an image, for any folder that `AutoModel` loads."""

    def __init__(self, train: Path, test: Path) -> None:
        from PIL import Image

        from hf_simprune.data.decoding import decode_image
        from hf_simprune.data.loading import (
            encoded_bytes,
            find_image_column,
            find_label_column,
            image_rows,
            load_split,
        )

        self.images, self.labels = [], []
        for path in (train, test):
            rows = load_split(str(path), "train")
            image, label = find_image_column(rows), find_label_column(rows.features)
            cells = image_rows(rows, image)
            self.images.append([Image.fromarray(decode_image(encoded_bytes(cell[image])).numpy()) for cell in cells])
            self.labels.append(torch.tensor(rows[label][:]))

    def hits(self, bank: torch.Tensor, queries: torch.Tensor) -> np.ndarray:
        from hf_simprune.evaluation.knn import knn_predict

        return (knn_predict(bank, self.labels[0], queries) == self.labels[1]).numpy()

    def model(self, folder: Path, processor_folder: Path) -> dict[str, np.ndarray]:
        from transformers import AutoImageProcessor, AutoModel

        from hf_simprune.evaluation.features import extract_features

        processor = AutoImageProcessor.from_pretrained(processor_folder, backend="pil")
        network = AutoModel.from_pretrained(folder)
        bank, queries = (extract_features(network, images, processor, 256, progress=False) for images in self.images)
        return {kind: self.hits(bank[kind], queries[kind]) for kind in ("cls", "patch_mean")}

    def pixels(self, processor_folder: Path) -> np.ndarray:
        from transformers import AutoImageProcessor

        from hf_simprune.evaluation.features import raw_pixel_features

        processor = AutoImageProcessor.from_pretrained(processor_folder, backend="pil")
        bank, queries = (raw_pixel_features(images, processor) for images in self.images)
        return self.hits(bank, queries)


def retained_gain(x: np.ndarray, random: np.ndarray, dense: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """(x − random) / (dense − random) of mean accuracies, with a 95 % bootstrap interval over images (columns)."""
    draws = np.random.default_rng(seed).integers(x.shape[-1], size=(10_000, x.shape[-1]))

    per_image = [values.mean(axis=0) for values in (x, random, dense)]
    means = np.stack([[values[images].mean() for values in per_image] for images in draws])
    low, high = np.percentile((means[:, 0] - means[:, 1]) / (means[:, 2] - means[:, 1]), [2.5, 97.5])
    gain = (x.mean() - random.mean()) / (dense.mean() - random.mean())
    return float(gain), float(low), float(high)


def report(hits: dict[str, np.ndarray], pixels: np.ndarray, kind: str) -> list[str]:
    """Table rows; `hits[name]` is (seeds, images)."""
    lines = [f"k-NN by {kind}: accuracy on {pixels.size} test images"]
    lines.append(f"  raw pixels      {100 * pixels.mean():6.2f} %")
    random, dense = hits["random network"], hits["none"]
    learned = dense.mean() - random.mean() >= GATE_RANDOM and dense.mean() - pixels.mean() >= GATE_PIXELS
    for name, values in hits.items():
        line = f"  {name:15} {100 * values.mean():6.2f} %"
        if len(values) > 1:
            line += "  seeds " + " ".join(f"{100 * value:.2f}" for value in values.mean(axis=1))
        if name not in ("random network", "none") and learned:
            gain, low, high = retained_gain(values, random, dense)
            line += f"  retained gain {gain:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(line)
    above_random, above_pixels = (100 * (dense.mean() - other.mean()) for other in (random, pixels))
    gate = "passed" if learned else "NOT passed: DINO did not learn enough, so nothing follows about pruning"
    lines.append(
        f"  gate: dense is {above_random:+.2f} over random (10 asked), {above_pixels:+.2f} over pixels (3): {gate}"
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="settings of the runs")
    parser.add_argument("--train", type=Path, required=True, help="parquet of training images with labels")
    parser.add_argument("--test", type=Path, required=True, help="parquet of test images with labels")
    parser.add_argument(
        "--reductions", nargs="+", default=["none", "simprune", "random"], help="none must be among them"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/comparison"))
    own, extra = sys.argv[1:], []
    if "--" in own:
        own, extra = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    if "none" not in args.reductions:
        parser.error("--reductions must include none, the dense run that gains are measured against")
    folders = {(r, s): args.output_dir / f"{r}-seed{s}" for s in args.seeds for r in args.reductions}
    seconds = {f"{r}-seed{s}": run(args.config, args.train, f, r, s, extra) for (r, s), f in folders.items()}
    judge = Judge(args.train, args.test)
    first = next(iter(folders.values()))
    pixels = judge.pixels(first)
    networks = {
        "random network": [judge.model(folders["none", s] / "training" / "initial", first) for s in args.seeds]
    }
    networks |= {r: [judge.model(folders[r, s], first) for s in args.seeds] for r in args.reductions}
    text = []
    for kind in ("cls", "patch_mean"):
        text += report({name: np.stack([m[kind] for m in made]) for name, made in networks.items()}, pixels, kind)
    print("\n".join(text))
    result = {
        "about": header(torch.device("cpu"), args.seeds[0]),
        "seeds": args.seeds,
        "seconds": seconds,
        "text": text,
    }
    (args.output_dir / "comparison.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
