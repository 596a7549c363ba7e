# SPDX-License-Identifier: Apache-2.0
"""What do DINO's crops of real images cost, from encoded bytes to normalised tensors?

The original's recipe runs torchvision's transforms on Pillow images, one crop after another. torchvision is no
dependency here, so that side is written from the recipe with the same Pillow calls that torchvision's Pillow backend
makes: crop, resize, transpose, ImageEnhance, an HSV shift, GaussianBlur, solarize, then ToTensor and Normalize. Both
sides get the same images and the same drawn parameters in every round, one after the other, and are measured in CPU
seconds of all threads (with `--device cuda`, the photometric stage in seconds of the device).

    python benchmarks/loader.py --dataset images.parquet
"""

import argparse
import io
import os
import statistics
import time


# Idle threads must sleep: a spinning one would be counted as work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from _measure import emit, header, median_ratio, seconds  # noqa: E402
from PIL import Image, ImageEnhance, ImageFilter, ImageOps  # noqa: E402

from hf_simprune.data.decoding import decode_image  # noqa: E402
from hf_simprune.data.loading import encoded_bytes, find_image_column, load_split  # noqa: E402
from hf_simprune.dino.augmentation import AugmentationConfig, sample_parameters  # noqa: E402
from hf_simprune.dino.batch import collate  # noqa: E402
from hf_simprune.dino.crops import output_sizes  # noqa: E402
from hf_simprune.dino.data import MultiCropDataset  # noqa: E402
from hf_simprune.dino.photometric import apply_photometric  # noqa: E402


PUBLISHED_IMAGES_PER_SECOND = 106  # of one GPU: ViT-S/16, 100 epochs on ImageNet in 1.75 days on 8 GPUs
CORES = (1, 2, 4, 8, 16)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="parquet file, folder or Hub name of images")
    parser.add_argument("--split", default="train")
    parser.add_argument("--global_crop_size", type=int, default=224)
    parser.add_argument("--local_crop_size", type=int, default=96)
    parser.add_argument("--local_crops_number", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where the photometric stage runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file to write all numbers to")
    return parser.parse_args()


def pillow_view(image: Image.Image, row: dict[str, np.ndarray], size: int, cfg: AugmentationConfig) -> torch.Tensor:
    """One crop as the original makes it, with given parameters; float32 (3, size, size)."""
    crop = image.crop(tuple(row["boxes"].tolist())).resize((size, size), Image.Resampling.BICUBIC)
    if row["flip"]:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for number in row["order"].tolist() if row["jitter"] else ():
        factor = float(row["factors"][number])
        if number < 3:
            enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[number]
            crop = enhancer(crop).enhance(factor)
        else:
            hue, saturation, value = crop.convert("HSV").split()
            shifted = np.array(hue, dtype=np.uint8) + np.uint8(int(factor * 255) % 256)
            crop = Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")
    if row["grayscale"]:
        grey = np.array(crop.convert("L"), dtype=np.uint8)
        crop = Image.fromarray(np.dstack([grey, grey, grey]))
    if row["blur_sigma"] > 0:
        crop = crop.filter(ImageFilter.GaussianBlur(radius=float(row["blur_sigma"])))
    if row["solarize"]:
        crop = ImageOps.solarize(crop)
    pixels = torch.from_numpy(np.array(crop, copy=True)).view(size, size, 3).permute(2, 0, 1).contiguous()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.image_mean, cfg.image_std))
    return pixels.to(torch.float32).div(255).sub_(mean).div_(std)


def pillow_batch(encoded: list[bytes], drawn: list[dict], cfg: AugmentationConfig) -> list[torch.Tensor]:
    """All crops of a batch, stacked view by view as the original's loader stacks them."""
    sizes = output_sizes(cfg).tolist()
    examples = []
    for image_bytes, parameters in zip(encoded, drawn):
        image = Image.open(io.BytesIO(image_bytes)).convert("RGB")
        rows = [{name: values[view] for name, values in parameters.items()} for view in range(len(sizes))]
        examples.append([pillow_view(image, row, size, cfg) for row, size in zip(rows, sizes)])
    return [torch.stack(views) for views in zip(*examples)]


def measure(args: argparse.Namespace, cfg: AugmentationConfig) -> dict[str, list[float]]:
    """Seconds an image of every stage in every round."""
    dataset = load_split(args.dataset, args.split)
    column = find_image_column(dataset)
    ours = MultiCropDataset(dataset, column, cfg, args.seed)
    cpu, device = torch.device("cpu"), torch.device(args.device)
    order = np.random.default_rng(args.seed).permutation(len(dataset))
    times: dict[str, list[float]] = {name: [] for name in ("original", "decode", "examples", "photometric", "wall")}
    made = {}

    def make() -> None:
        made["batch"] = collate([ours[epoch, index] for index in indexes])

    for epoch in range(args.rounds + 1):
        indexes = np.resize(np.roll(order, -epoch * args.batch), args.batch).tolist()
        encoded = [encoded_bytes(ours.rows[index][column]) for index in indexes]
        drawn = []
        for index, image_bytes in zip(indexes, encoded):
            width, height = Image.open(io.BytesIO(image_bytes)).size
            drawn.append(sample_parameters(cfg, args.seed, epoch, index, width, height))
        begin = time.perf_counter()
        costs = {
            "examples": seconds(make, cpu),
            "photometric": seconds(lambda: apply_photometric(made["batch"], cfg, device), device),
        }
        costs["wall"] = time.perf_counter() - begin
        costs["original"] = seconds(lambda: pillow_batch(encoded, drawn, cfg), cpu)
        costs["decode"] = seconds(lambda: [decode_image(image_bytes) for image_bytes in encoded], cpu)
        if epoch:  # the first round warms up
            for name, cost in costs.items():
                times[name].append(cost / args.batch)
    return times


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    cfg = AugmentationConfig(
        global_crop_size=args.global_crop_size,
        local_crop_size=args.local_crop_size,
        local_crops_number=args.local_crops_number,
    )
    report = header(torch.device(args.device), args.seed)
    for key, value in report.items():
        print(f"{key}: {value}")
    times = measure(args, cfg)
    whole = [example + photometric for example, photometric in zip(times["examples"], times["photometric"])]
    crops = [example - decode for example, decode in zip(times["examples"], times["decode"])]
    milliseconds = {
        "original (Pillow), all stages": times["original"],
        "ours, all stages": whole,
        "  decode": times["decode"],
        "  sample, crop, stack": crops,
        f"  photometric ({args.device})": times["photometric"],
        "ours, wall": times["wall"],
    }
    print(f"\n{'ms an image and core':34}{'median':>8}{'least':>8}")
    for name, values in milliseconds.items():
        print(f"{name:34}{1e3 * statistics.median(values):8.2f}{1e3 * min(values):8.2f}")
    ratio = median_ratio(whole, times["original"])
    print(f"\nours / original: {ratio} (95 % bootstrap interval over {args.rounds} rounds)")
    rates = {
        "all stages on the CPU": 1 / statistics.median(whole),
        "photometric on a GPU": 1 / statistics.median(times["examples"]),
    }
    print(f"\nimages a second fed by {', '.join(map(str, CORES))} cores, and cores for the published rate")
    for name, rate in rates.items():
        fed = " ".join(f"{cores * rate:7.0f}" for cores in CORES)
        print(f"{name:24}{fed}   {PUBLISHED_IMAGES_PER_SECOND / rate:.2f} cores for {PUBLISHED_IMAGES_PER_SECOND}")
    report |= {"seconds_an_image": times, "ratio": ratio._asdict(), "images_per_second_and_core": rates}
    emit(report, args.json)


if __name__ == "__main__":
    main()
