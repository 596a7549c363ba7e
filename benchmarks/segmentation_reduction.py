# SPDX-License-Identifier: Apache-2.0
"""Does a network still see where things are when tokens are merged or dropped on the way and put back at the end?

    python -W ignore benchmarks/segmentation_reduction.py --model DEIT_TINY --scenes CAMVID.parquet --json seg.json

The parquet is that of `rba_segmentation.py`. Every method reduces the tokens of the frozen network at the same layers,
and the patch tokens are restored to the full grid: a merged token is copied to all its patches, clusters are mixed
back, a dropped patch has what it had when it left. On these tokens one linear layer is trained for every method alike
(retrained), and the one of the unpruned network is used as it is (as it was). mIoU on the test images; differences to
the unpruned network are paired, * where the 95 % interval excludes 0. FLOPs are counted while the network runs,
without the linear layer. `random` and `position`, which drop by chance and from the border on, are controls.
"""

import argparse
import os


# Idle threads must sleep: a spinning one would be counted as work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from _intervals import Estimate  # noqa: E402
from _measure import emit, header  # noqa: E402
from _segmentation import Scenes, load_scenes  # noqa: E402
from _walks import dense_tokens, load_backbone, parse_method, reduction_setting, registered  # noqa: E402
from transformers import AutoImageProcessor, PreTrainedModel  # noqa: E402

from hf_simprune.errors import InputError  # noqa: E402
from hf_simprune.evaluation.model_cost import macs  # noqa: E402
from hf_simprune.evaluation.segmentation import (  # noqa: E402
    LinearSegmenter,
    SegmentationResult,
    evaluate_segmentation,
    fit_segmenter,
    miou_difference,
    patch_tokens,
)
from hf_simprune.reduction import BranchReducer  # noqa: E402


METHODS = registered(
    "random", "position", "evit", "evit:fuse=false", "tome", "mctf", "expedit", "expedit:temperature=1"
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub name or folder of a ViT or DeiT")
    parser.add_argument("--scenes", required=True, help="parquet with image, mask and split")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="such as tome:proportional=false")
    parser.add_argument("--keep_rate", type=float, nargs="+", default=[0.8, 0.7])
    parser.add_argument("--steps", type=int, default=400, help="of training the linear layer")
    parser.add_argument("--limit", type=int, help="images of each part at most, for a trial run")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the numbers to this file")
    return parser.parse_args()


class Bench:
    """The frozen network on the scenes, under one reducer after another."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model: PreTrainedModel = load_backbone(args.model).to(args.device)
        processor = AutoImageProcessor.from_pretrained(args.model, backend="pil")
        patch = self.model.config.patch_size
        self.scenes: Scenes = load_scenes(args.scenes, processor, (patch, patch), args.limit)

    def tokens(self, reducer: BranchReducer | None) -> torch.Tensor:
        """(N, patches, D), train scenes first."""
        torch.manual_seed(self.args.seed)
        batches = self.scenes.reader.pixel_values.split(self.args.batch)
        return patch_tokens(lambda pixels: dense_tokens(self.model, pixels.to(self.args.device), reducer), batches)

    def fit(self, tokens: torch.Tensor) -> LinearSegmenter:
        scenes, cut = self.scenes, self.scenes.train
        options = {"num_classes": scenes.ignore, "ignore_index": scenes.ignore}
        options |= {"steps": self.args.steps, "seed": self.args.seed}
        return fit_segmenter(tokens[:cut], scenes.masks[:cut], scenes.grid, **options)

    def test(self, segmenter: LinearSegmenter, tokens: torch.Tensor) -> SegmentationResult:
        scenes, cut = self.scenes, self.scenes.train
        return evaluate_segmentation(segmenter, tokens[cut:], scenes.masks[cut:], scenes.ignore, self.args.seed)

    def macs(self, reducer: BranchReducer | None) -> int:
        pixels = self.scenes.reader.pixel_values[:1].to(self.args.device)
        return macs(lambda batch: dense_tokens(self.model, batch, reducer), pixels)


def run(args: argparse.Namespace) -> dict[str, object]:
    methods = [parse_method(text) for text in args.methods]
    for method in methods:
        if not method.reduces_alone:
            raise InputError(f"--methods {method.label}: it does not reduce a single image by itself; leave it out")
    bench = Bench(args)
    scenes = bench.scenes
    print(f"{scenes.train} train, {len(scenes.masks) - scenes.train} test scenes on {scenes.grid} patches", flush=True)
    tokens = bench.tokens(None)
    segmenter, cost = bench.fit(tokens), bench.macs(None)
    unpruned = bench.test(segmenter, tokens)
    print(f"  unpruned  mIoU {percent(unpruned).text(1)}", flush=True)
    rows = []
    setting = reduction_setting(bench.model, scenes.grid)
    for rate in args.keep_rate:
        for method in methods:
            reducer = method.build(rate, setting)
            tokens = bench.tokens(reducer)
            row = {"keep_rate": rate, "method": method.label, "flops": bench.macs(reducer) / cost}
            text = f"  keep {rate} {method.label:16} FLOPs {100 * row['flops']:.1f} %"
            for kind, found in (
                ("retrained", bench.test(bench.fit(tokens), tokens)),
                ("as it was", bench.test(segmenter, tokens)),
            ):
                difference = Estimate(*(100 * value for value in miou_difference(found, unpruned, args.seed)))
                row[kind] = {"miou": percent(found), "difference": difference}
                mark = " *" if difference.differs else ""
                text += f"  {kind}: mIoU {percent(found).text(1)}, difference {difference.text(1, '+')}{mark}"
            rows.append(row)
            print(text, flush=True)
    return {"grid": scenes.grid, "train": scenes.train, "unpruned": percent(unpruned), "rows": rows}


def percent(result: SegmentationResult) -> Estimate:
    """mIoU in percent."""
    return Estimate(*(100 * value for value in (result.miou, *result.interval)))


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    about = header(torch.device(args.device), args.seed)
    for key, value in about.items():
        print(f"{key}: {value}")
    try:
        emit({"about": about, **run(args)}, args.json)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
