# SPDX-License-Identifier: Apache-2.0
"""Does a compressed network still see where things are? Linear segmentation on frozen patch tokens.

    python -W ignore benchmarks/rba_segmentation.py --model CLASSIFIER --scenes CAMVID.parquet --json segmentation.json

The parquet holds encoded images, encoded masks of class numbers (column mask, the last class does not count) and a
column split (train, others). The network is calibrated on the train images without their masks, at the size that is
segmented: the image's own, rounded to whole patches, positions interpolated. One linear layer is then trained on the
frozen patch tokens of the train images, for the original and every compressed network alike, and mIoU is measured on
the others; intervals draw the test images again. Plans are chosen by the KL of the classifier's logits, as for any
classifier: nothing was told of segmentation.
"""

import argparse
import os


# Idle threads must sleep: a spinning one would be counted as work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from _measure import emit, header  # noqa: E402
from _rba import calibration_rows, load_network, paper_choice  # noqa: E402
from _segmentation import Scenes, load_scenes  # noqa: E402

from hf_simprune.evaluation.segmentation import (  # noqa: E402
    SegmentationResult,
    evaluate_segmentation,
    fit_segmenter,
    miou_difference,
    patch_tokens,
)
from hf_simprune.rba import analyze, choose, convert  # noqa: E402
from hf_simprune.rba.adapters import Adapter, adapter_for  # noqa: E402
from hf_simprune.rba.adapters.base import pair  # noqa: E402
from hf_simprune.rba.choice import network_pieces  # noqa: E402
from hf_simprune.rba.planner import Budget  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of an image classifier")
    parser.add_argument("--scenes", required=True, help="parquet with image, mask and split")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--cost_images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400, help="of training the linear layer")
    parser.add_argument("--limit", type=int, help="images of each part at most, for a trial run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the numbers to this file")
    return parser.parse_args()


def tokens_of(adapter: Adapter, scenes: Scenes) -> torch.Tensor:
    """(N, patches, D) patch tokens of all scenes."""

    def dense(pixel_values: torch.Tensor) -> torch.Tensor:
        hidden, context = adapter.embed(pixel_values)
        for block in range(adapter.depth):
            hidden = adapter.block(block, hidden, context)
        return adapter.dense(hidden)

    return patch_tokens(dense, scenes.reader.pixel_values.split(8))


def measure(adapter: Adapter, scenes: Scenes, args: argparse.Namespace) -> SegmentationResult:
    """Train the linear layer on the train scenes and test it on the others."""
    tokens, cut = tokens_of(adapter, scenes), scenes.train
    options = {"num_classes": scenes.ignore, "ignore_index": scenes.ignore, "steps": args.steps, "seed": args.seed}
    segmenter = fit_segmenter(tokens[:cut], scenes.masks[:cut], scenes.grid, **options)
    return evaluate_segmentation(segmenter, tokens[cut:], scenes.masks[cut:], scenes.ignore, args.seed)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    adapter, processor = load_network(args.model)
    scenes = load_scenes(args.scenes, processor, pair(adapter.tower.config.patch_size), args.limit)
    print(f"{scenes.train} train, {len(scenes.masks) - scenes.train} test scenes on {scenes.grid} patches", flush=True)
    original = measure(adapter, scenes, args)
    print(f"original  mIoU {text(100 * original.miou, original.interval)}", flush=True)
    analysis = analyze(
        adapter.model,
        calibration_rows(scenes.reader, range(scenes.train), args.seed),
        kinds=("fold", "linear"),
        max_span=max(args.blocks),  # no plan that removes so many blocks has a longer span
        cost_images=args.cost_images,
        chunk_size=8,
        progress=False,
    )
    pieces = network_pieces(analysis)
    rows = []
    for n in args.blocks:
        chosen = choose(analysis, Budget("blocks", n), kinds=("fold",), pieces=pieces, refine=False)
        for method, plan, maps in (
            ("fold", chosen.plan, chosen.maps),
            ("BR-all", *paper_choice(analysis, n, "all")),
        ):
            result = measure(adapter_for(convert(adapter.model, plan, maps)), scenes, args)
            difference = miou_difference(result, original, args.seed)
            rows.append(
                {
                    "blocks": n,
                    "method": method,
                    "plan": str(plan),
                    "miou": 100 * result.miou,
                    "interval": [100 * value for value in result.interval],
                    "difference": [100 * value for value in difference],
                }
            )
            print(
                f"{n} blocks  {method:7} mIoU {text(rows[-1]['miou'], result.interval)}  difference "
                f"{text(100 * difference[0], difference[1:])}  {plan}",
                flush=True,
            )
    report = {"about": header(torch.device("cpu"), args.seed), "grid": scenes.grid, "train": scenes.train}
    report |= {"original": {"miou": 100 * original.miou, "interval": [100 * value for value in original.interval]}}
    report |= {"per_class": original.per_class.tolist(), "rows": rows}
    emit(report, args.json)


def text(percent: float, interval: tuple[float, ...]) -> str:
    return f"{percent:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


if __name__ == "__main__":
    main()
