# SPDX-License-Identifier: Apache-2.0
"""Which tokens does a method keep, and do both views of an image keep the same places? No training.

    python benchmarks/correspondence.py --model DEIT_TINY --images IMAGENET_SAMPLE.parquet --json correspondence.json
    python benchmarks/correspondence.py --images CIFAR_TEST.parquet \
        --checkpoints RUN/training/initial RUN/checkpoint-1500 RUN/checkpoint-3000

Two crops of every image are cut as training cuts its global crops, colours left alone; boxes and flips are known, so
every patch has its place in the source image. Both go through the network under each method at the same layers and
keep rate, `--checkpoints` one after another. With a method that looks across views the first crop is the student's
and the second the teacher's, both with the network's weights. Columns, means over images:

    overlap     share of the first view's tokens whose most similar token of the second view (cosine, behind the block
                of the last stage) shows the same place, that is, overlaps in the source image
    position    the same where the match is the token at the same place within the crop
    chance      the same where the match is drawn at random
    area IoU    source area that both views keep, over the area that either keeps
    CLS kept    cosine of the CLS token with that of the unpruned network, mean of both views
    CLS margin  cosine of both views' CLS tokens, minus that of the first view with the second views of other images

A merged token is spread evenly over its patches: they weigh 1/s each in the IoU, and its overlap is the share of its
patches' pairs that overlap. The fused token of EViT stands for no patch and is not matched. Controls: `random` keeps
patches by chance, `position` those nearest to the middle of the crop. FLOPs are counted while the network runs.
Intervals draw the images again; of two methods on the same images only the paired difference counts (* where its 95 %
interval excludes 0).
"""

import argparse
import os
from pathlib import Path
from typing import Any


# Idle threads must sleep: a spinning one would be counted as work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from _correspondence import (  # noqa: E402
    cls_margin,
    match_by_cosine,
    match_by_position,
    members,
    overlap_by_chance,
    overlap_of_matches,
    pair_overlap,
    patch_weights,
)
from _crops import crop_pairs, overlap_areas, patch_boxes, read_images, weighted_iou  # noqa: E402
from _intervals import difference_interval, mean_interval  # noqa: E402
from _measure import emit, header  # noqa: E402
from _walks import (  # noqa: E402
    Method,
    grid_of,
    load_backbone,
    parse_method,
    reduction_setting,
    registered,
    walk_pairs,
)
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import AutoImageProcessor, PreTrainedModel  # noqa: E402

from hf_simprune.dino.augmentation import AugmentationConfig  # noqa: E402
from hf_simprune.errors import InputError  # noqa: E402
from hf_simprune.evaluation.model_cost import macs  # noqa: E402
from hf_simprune.reduction import PairReducer, TokenReducer  # noqa: E402


METHODS = registered(
    "none", "random", "position", "simprune@0", "simprune@0.5", "simprune@1", "evit", "tome", "mctf", "expedit",
)  # fmt: skip
COLUMNS = {
    "overlap": "overlap",
    "position": "position",
    "chance": "chance",
    "iou": "area IoU",
    "cls": "CLS kept",
    "margin": "CLS margin",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub name or folder of a ViT or DeiT")
    parser.add_argument("--checkpoints", nargs="+", default=[], help="folders of a training run, see above")
    parser.add_argument("--images", required=True, help="parquet of encoded images in a column image")
    parser.add_argument("--limit", type=int, default=500, help="images, the first ones")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="such as tome:proportional=false, simprune@0.5")
    parser.add_argument("--against", nargs="+", default=["simprune@0.5", "random"], help="what to compare with")
    parser.add_argument("--keep_rate", type=float, nargs="+", default=[0.7])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the numbers to this file")
    return parser.parse_args()


def augmentation(folder: str, model: PreTrainedModel) -> AugmentationConfig:
    """Global crops of the size that the network was made for, normalised as its image processor has it.

    Searched for in the folder and those above it; a run that has not ended has no processor yet, and DINO's mean and
    deviation of ImageNet are taken.
    """
    size = {"global_crop_size": model.config.image_size, "local_crops_number": 0}
    places = [folder] if not Path(folder).is_dir() else [Path(folder), *list(Path(folder).resolve().parents)[:2]]
    for place in places:
        if not isinstance(place, Path) or (place / "preprocessor_config.json").is_file():
            found = AutoImageProcessor.from_pretrained(place, backend="pil")
            return AugmentationConfig(**size, image_mean=tuple(found.image_mean), image_std=tuple(found.image_std))
    print(f"{folder}: no image processor; normalised as ImageNet is")
    return AugmentationConfig(**size)


class Bench:
    """One network on the crops of the images, batch by batch, every method on the same crops."""

    def __init__(self, folder: str, encoded: list[bytes], keep_rate: float, args: argparse.Namespace) -> None:
        self.model = load_backbone(folder).to(args.device)
        self.config = augmentation(folder, self.model)
        self.encoded = encoded
        self.batch, self.seed, self.device = args.batch, args.seed, args.device
        side = self.config.global_crop_size
        self.grid = grid_of(self.model, torch.empty(1, 3, side, side))
        self.setting = reduction_setting(self.model, self.grid)
        self.keep_rate = keep_rate

    def measure(self, methods: list[Method]) -> dict[str, dict[str, np.ndarray]]:
        """(images,) values of every column, by method."""
        torch.manual_seed(self.seed)
        reducers = {method.label: method.build(self.keep_rate, self.setting) for method in methods}
        found = {method.label: [] for method in methods}
        cls: dict[str, list[Tensor]] = {method.label: [] for method in methods}
        for start in range(0, len(self.encoded), self.batch):
            numbers = range(start, min(start + self.batch, len(self.encoded)))
            pairs = crop_pairs([self.encoded[i] for i in numbers], numbers, self.config, self.seed)
            pixels = pairs.pixels.to(self.device)
            boxes = patch_boxes(pairs.boxes, pairs.flips, self.grid).to(self.device).chunk(2)
            overlap = overlap_areas(*boxes)
            unpruned = walk_pairs(self.model, pixels, None)
            for method in methods:
                reducer = reducers[method.label]
                passed = unpruned if reducer is None else walk_pairs(self.model, pixels, reducer, method.window)
                cls[method.label].append(passed.cls.unflatten(0, (2, -1)))
                values = places(passed.tokens, passed.groups, boxes, overlap, self.grid)
                kept = F.cosine_similarity(passed.cls.double(), unpruned.cls.double(), dim=-1)
                found[method.label].append(values | {"cls": kept.unflatten(0, (2, -1)).mean(0)})
        results = {}
        for label, parts in found.items():
            margin = cls_margin(*torch.cat(cls[label], dim=1))
            columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} | {"margin": margin}
            results[label] = {name: columns[name].double().cpu().numpy() for name in COLUMNS}
        return results

    def flops(self, method: Method) -> float:
        """MACs with the method over those without, counted on the crops of the first image."""
        pixels = crop_pairs(self.encoded[:1], [0], self.config, self.seed).pixels.to(self.device)

        def count(reducer: TokenReducer | None) -> int:
            return macs(lambda batch: walk_pairs(self.model, batch, reducer, method.window), pixels)

        reducer = method.build(self.keep_rate, self.setting)
        branches = 2 if isinstance(reducer, PairReducer) else 1
        return count(reducer) / (branches * count(None))


def places(
    tokens: Tensor, groups: Tensor, boxes: tuple[Tensor, Tensor], overlap: Tensor, grid: tuple[int, int]
) -> dict[str, Tensor]:
    """(B,) of the columns about places, from tokens (2B, m, D) and groups (2B, N) of both views."""
    (tokens_a, tokens_b), (groups_a, groups_b) = tokens.chunk(2), groups.chunk(2)
    count = tokens.shape[1]
    members_a, members_b = members(groups_a, count), members(groups_b, count)
    counted, candidates = members_a.sum(-1) > 0, members_b.sum(-1) > 0
    pairs = pair_overlap(members_a, members_b, overlap > 0)
    weights = patch_weights(groups_a, count), patch_weights(groups_b, count)
    return {
        "overlap": overlap_of_matches(pairs, match_by_cosine(tokens_a, tokens_b, candidates), counted),
        "position": overlap_of_matches(pairs, match_by_position(members_a, members_b, grid), counted),
        "chance": overlap_by_chance(pairs, counted, candidates),
        "iou": weighted_iou(*weights, *boxes, overlap),
    }


def report(values: dict[str, dict[str, np.ndarray]], flops: dict[str, float], args: argparse.Namespace) -> dict:
    """Print the table and the paired differences; returns them for the JSON file."""
    width = max(map(len, values)) + 2
    print("  " + "".ljust(width) + " FLOPs" + "".join(f"{title:>24}" for title in COLUMNS.values()))
    rows, differences = {}, {}
    for label, columns in values.items():
        rows[label] = {name: mean_interval(column, args.seed) for name, column in columns.items()}
        texts = "".join(f"{estimate.text():>24}" for estimate in rows[label].values())
        print(f"  {label:{width}}{100 * flops[label]:5.1f}%{texts}", flush=True)
        rows[label] |= {"flops": flops[label]}
    for reference in [name for name in args.against if name in values]:
        print(f"  paired difference to {reference}, * where its interval excludes 0")
        for label in [name for name in values if name != reference]:
            found = {
                name: difference_interval(values[label][name], values[reference][name], args.seed) for name in COLUMNS
            }
            texts = "".join(f"{e.text(sign='+') + (' *' if e.differs else '  '):>26}" for e in found.values())
            print(f"  {label:{width}}{texts}", flush=True)
            differences[f"{label} - {reference}"] = found
    return {"rows": rows, "differences": differences}


def run(args: argparse.Namespace) -> dict[str, Any]:
    methods = [parse_method(text) for text in args.methods]
    encoded = read_images(args.images, args.limit)
    if len(encoded) < 2:
        raise InputError(f"--images {args.images}, --limit {args.limit}: at least 2 images are needed")
    found: dict[str, Any] = {}
    for folder in [*([args.model] if args.model else []), *args.checkpoints]:
        for keep_rate in args.keep_rate:
            bench = Bench(folder, encoded, keep_rate, args)
            print(f"\n{folder}, keep rate {keep_rate}, {len(encoded)} images on {bench.grid} patches", flush=True)
            values = bench.measure(methods)
            flops = {method.label: bench.flops(method) for method in methods}
            found[f"{folder} keep {keep_rate}"] = report(values, flops, args)
    return found


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    about = header(torch.device(args.device), args.seed)
    for key, value in about.items():
        print(f"{key}: {value}")
    if not args.model and not args.checkpoints:
        raise SystemExit("error: give a network with --model, or some with --checkpoints")
    try:
        emit({"about": about, "images": args.limit, "networks": run(args)}, args.json)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
