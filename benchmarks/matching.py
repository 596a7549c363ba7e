# SPDX-License-Identifier: Apache-2.0
"""What does it cost to pair the tokens of two views exactly, and is it better?

    python benchmarks/matching.py --model DEIT_TINY --images IMAGENET_SAMPLE.parquet --json matching.json

Two crops of every image with known boxes, 14 x 14 patches at 224 pixels and patch size 16, so N = 196, on real
features: what the first reduction layer matches. For one-way (the default), symmetric, greedy and Hungarian:

    time        of matching and selection, cosines included and without them, over that of one-way; sides take turns
    imbalance   one-way only, before the top-up: teacher tokens left when the partners of the pruned student tokens
                leave, over the tokens the student keeps, minus 1 (the paper: under 10 %); and by how much fewer
                tokens the teacher prunes than the student
    cosine      mean cosine of a student token and its partner
    precision   share of partners that overlap in the source image, of all student tokens, and of those that have an
                overlapping token at all
    kept alike  share of kept student tokens whose partner is kept too

The window stands at 0, 0.5 and 1. Hungarian runs on the CPU (scipy), wherever the network runs, as there is no other.
"""

import argparse
import os


# Idle threads must sleep: a spinning one would be counted as work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from _crops import crop_pairs, overlap_areas, patch_boxes, read_images  # noqa: E402
from _intervals import mean_interval  # noqa: E402
from _matchings import SELECTIONS, matches, teacher_left  # noqa: E402
from _measure import emit, header, interleave, median_ratio  # noqa: E402
from _walks import grid_of, load_backbone  # noqa: E402
from correspondence import augmentation  # noqa: E402
from torch import Tensor  # noqa: E402

from hf_simprune.reduction import default_reduction_layers, keep_count, window_offset  # noqa: E402
from hf_simprune.reduction.simprune import cosine_similarity  # noqa: E402


WINDOWS = (0.0, 0.5, 1.0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub name or folder of a ViT or DeiT")
    parser.add_argument("--images", required=True, help="parquet of encoded images in a column image")
    parser.add_argument("--limit", type=int, default=64, help="images, the first ones")
    parser.add_argument("--keep_rate", type=float, nargs="+", default=[0.8, 0.7])
    parser.add_argument("--batch", type=int, default=8, help="images whose two views are matched at a time")
    parser.add_argument("--rounds", type=int, default=10, help="of timing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the numbers to this file")
    return parser.parse_args()


@torch.no_grad()
def tokens_and_overlap(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher tokens (images, N, D) at the first reduction layer, and what overlaps, (images, N, N)."""
    model = load_backbone(args.model).to(args.device)
    config = augmentation(args.model, model)
    encoded = read_images(args.images, args.limit)
    layer, prefix = default_reduction_layers(len(model.layers))[0], model.num_prefix_tokens
    found = []
    for start in range(0, len(encoded), args.batch):
        numbers = range(start, min(start + args.batch, len(encoded)))
        pairs = crop_pairs([encoded[i] for i in numbers], numbers, config, args.seed)
        hidden = model.embed(pairs.pixels.to(args.device))
        for block in model.layers[:layer]:
            hidden = block(hidden)
        hidden = model.layers[layer](hidden, half="attention")[:, prefix:]
        boxes = patch_boxes(pairs.boxes, pairs.flips, grid_of(model, pairs.pixels)).chunk(2)
        found.append((*hidden.chunk(2), (overlap_areas(*boxes) > 0).to(args.device)))
    return tuple(torch.cat(parts) for parts in zip(*found))


def time_ratios(student: Tensor, teacher: Tensor, args: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Median time of each matching over that of one-way, on the tokens of one batch in both directions."""
    device = torch.device(args.device)
    first, second = student[: args.batch], teacher[: args.batch]
    a, b = torch.cat([first, second]), torch.cat([second, first])
    count = a.shape[1]
    keep = keep_count(count, args.keep_rate[0])
    offset = window_offset(torch.tensor(0.5, device=device), count, keep)
    similarity = cosine_similarity(a, b)
    whole = {n: (lambda s=s: s(cosine_similarity(a, b), keep, offset)) for n, s in SELECTIONS.items()}
    alone = {n: (lambda s=s: s(similarity, keep, offset)) for n, s in SELECTIONS.items()}
    found: dict[str, dict[str, object]] = {name: {} for name in SELECTIONS}
    for kind, sides in (("whole", whole), ("alone", alone)):
        times = interleave(sides, args.rounds, device, warmup=1)
        for name in SELECTIONS:
            found[name][kind] = median_ratio(times[name], times["one_way"])
            found[name][f"{kind}_seconds"] = sorted(times[name])[len(times[name]) // 2] / len(a)
    return found


def quality(student: Tensor, teacher: Tensor, overlaps: Tensor, args: argparse.Namespace) -> dict[str, dict]:
    """Cosine and precision of the partners of every matching, means over images with intervals."""
    similarity = cosine_similarity(student, teacher)
    can = overlaps.any(2)
    found = {}
    for name in SELECTIONS:
        partner = matches(name, similarity).unsqueeze(2)
        hit = overlaps.gather(2, partner).squeeze(2).double()
        some = can.any(1)  # crops need not overlap at all
        values = {
            "cosine": similarity.gather(2, partner).squeeze(2).double().mean(1),
            "precision": hit.mean(1),
            "precision_where_possible": ((hit * can).sum(1) / can.sum(1).clamp_min(1))[some],
        }
        found[name] = {key: mean_interval(value.cpu().numpy(), args.seed) for key, value in values.items()}
    return found


def balance(student: Tensor, teacher: Tensor, args: argparse.Namespace) -> list[dict[str, object]]:
    """Imbalance of one-way before the top-up, and kept pairs of every matching, by keep rate and window."""
    similarity = cosine_similarity(student, teacher)
    count = similarity.shape[1]
    rows = []
    for rate in args.keep_rate:
        keep = keep_count(count, rate)
        for window in WINDOWS:
            offset = window_offset(torch.tensor(window, device=similarity.device), count, keep)
            left = teacher_left(similarity, keep, offset).double()
            imbalance, fewer = left / keep - 1, (left - keep) / max(1, count - keep)
            row = {"keep_rate": rate, "window": window, "kept_alike": {}}
            row["imbalance"] = mean_interval(imbalance.cpu().numpy(), args.seed)
            row["largest_imbalance"] = imbalance.max().item()
            row["fewer_pruned"] = mean_interval(fewer.cpu().numpy(), args.seed)
            for name, select in SELECTIONS.items():
                kept, also = select(similarity, keep, offset)
                stays = torch.zeros_like(similarity[:, 0], dtype=torch.bool).scatter(1, also, True)
                alike = stays.gather(1, matches(name, similarity).gather(1, kept)).double().mean(1)
                row["kept_alike"][name] = mean_interval(alike.cpu().numpy(), args.seed)
            rows.append(row)
    return rows


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    about = header(torch.device(args.device), args.seed)
    for key, value in about.items():
        print(f"{key}: {value}")
    student, teacher, overlaps = tokens_and_overlap(args)
    images, count, width = student.shape
    print(f"\n{images} images, N = {count}, width {width}")
    times = time_ratios(student, teacher, args)
    found = quality(student, teacher, overlaps, args)
    for name in SELECTIONS:
        time, row = times[name], found[name]
        print(
            f"  {name:10} time {time['whole']} ({1e3 * time['whole_seconds']:.3f} ms a pair of views), without "
            f"cosines {time['alone']}; cosine {row['cosine'].text()}; precision {row['precision'].text()}, "
            f"where possible {row['precision_where_possible'].text()}",
            flush=True,
        )
    rows = balance(student, teacher, args)
    for row in rows:
        alike = ", ".join(f"{name} {estimate.value:.2f}" for name, estimate in row["kept_alike"].items())
        print(
            f"  keep {row['keep_rate']} window {row['window']}: before the top-up {row['imbalance'].text()} more kept "
            f"(largest {row['largest_imbalance']:.3f}), {row['fewer_pruned'].text()} fewer pruned; "
            f"kept alike: {alike}",
            flush=True,
        )
    report = {"about": about, "images": images, "tokens": count, "times": times, "quality": found, "balance": rows}
    emit(report, args.json)


if __name__ == "__main__":
    main()
