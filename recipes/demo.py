# SPDX-License-Identifier: Apache-2.0
"""The main job on an embedded data set: scikit-learn's handwritten digits, real images that need no network.

    python recipes/demo.py

Trains a ViT-micro without labels (DINO, SimPrune at keep rate 0.7), compares the k-NN accuracy of its features with
those of the same network untrained and of raw pixels, and reloads the result with stock transformers in a fresh
process. Then removes the block that matters least without further training, and compares and reloads again. Exits
non-zero when training does not beat the untrained network or reloaded features differ.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import Tensor


RECIPES = Path(__file__).parent
TEST_SHARE = 0.3
SEED = 0

RELOAD = """
import sys
from safetensors.torch import load_file, save_file
import torch
from transformers import AutoModel
folder, pixels, out = sys.argv[1:]
model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
assert "hf_simprune" not in sys.modules
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
with torch.no_grad():
    output = model.eval()(load_file(pixels)["pixel_values"])
save_file({"last_hidden_state": output.last_hidden_state, "pooler_output": output.pooler_output}, out)
print(type(model).__module__ + "." + type(model).__name__)
"""


def write_digits(folder: Path) -> None:
    """Digits as PNG bytes with labels in `train.parquet` and `test.parquet`, split once and for all."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    splits = train_test_split(
        range(len(digits.images)), test_size=TEST_SHARE, random_state=SEED, stratify=digits.target
    )
    for name, rows in zip(("train", "test"), splits, strict=True):
        images = [PILImage.fromarray((digits.images[i] * 255 / 16).round().astype("uint8")) for i in rows]
        labels = [int(digits.target[i]) for i in rows]
        Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(folder / f"{name}.parquet")


def train(config: Path, data: Path, model: Path, extra: list[str]) -> None:
    """`accelerate launch recipes/train_dino.py` in a process of its own."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(RECIPES / "accelerate_configs" / "cpu.yaml"), str(RECIPES / "train_dino.py")]
    command += ["--config", str(config), "--dataset_name_or_path", str(data), "--output_dir", str(model)]
    command += ["--overwrite_output_dir", *extra]
    print("$", " ".join(command[2:]), flush=True)
    status = subprocess.run(command).returncode
    if status:
        sys.exit(f"training stopped with status {status}")


def compare(data: Path, model: Path) -> bool:
    """Print the table; whether the trained network beats the untrained one on every bound of the interval."""
    import torch
    from datasets import load_dataset
    from transformers import AutoImageProcessor, AutoModel

    from hf_simprune.evaluation.features import extract_features, raw_pixel_features
    from hf_simprune.evaluation.knn import few_label_knn, knn_accuracy, paired_bootstrap_interval

    sets = load_dataset("parquet", data_files={s: str(data / f"{s}.parquet") for s in ("train", "test")})
    images = {name: [image.convert("RGB") for image in sets[name]["image"]] for name in sets}
    labels = {name: torch.tensor(sets[name]["label"]) for name in sets}
    processor = AutoImageProcessor.from_pretrained(model, backend="pil")
    networks = {"random network": model / "training" / "initial", "trained network": model}
    rows = {}
    for title, folder in networks.items():
        network = AutoModel.from_pretrained(folder)
        rows[title] = {s: extract_features(network, images[s], processor, progress=False)["cls"] for s in images}
    rows["raw pixels"] = {s: raw_pixel_features(images[s], processor) for s in images}
    print(f"\nk-NN accuracy on {len(labels['test'])} test images (20 neighbours, temperature 0.07)")
    print(f"{'':18}{'10 labels a class':>24}{'all ' + str(len(labels['train'])) + ' labels':>20}")
    draws = {}
    for title, features in rows.items():
        bank = features["train"], labels["train"], features["test"], labels["test"]
        draws[title] = few_label_knn(*bank, labels_per_class=10, draws=20, seed=SEED)
        mean, spread = 100 * draws[title].mean(), 100 * draws[title].std()
        print(f"{title:18}{f'{mean:.1f} % ± {spread:.1f} (20 draws)':>24}{100 * knn_accuracy(*bank):>18.1f} %")
    gain, low, high = paired_bootstrap_interval(draws["trained network"], draws["random network"], seed=SEED)
    interval = f"95 % interval [{100 * low:+.1f}, {100 * high:+.1f}]"
    print(f"\ntrained - random, paired over the draws: {100 * gain:+.1f} points, {interval}")
    return low > 0


def reload_elsewhere(data: Path, model: Path) -> bool:
    """Whether stock `AutoModel` in a fresh process gives the trained network's features to the last bit."""
    import torch
    from datasets import load_dataset
    from transformers import AutoImageProcessor

    from hf_simprune.dino.export import load_teacher_backbone

    images = load_dataset("parquet", data_files=str(data / "test.parquet"), split="train[:64]")["image"]
    processor = AutoImageProcessor.from_pretrained(model, backend="pil")
    pixels = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    teacher = load_teacher_backbone(model)
    with torch.no_grad():
        expected = teacher.eval()(pixels).last_hidden_state
    return loads_elsewhere(data, model, pixels, expected)


def loads_elsewhere(data: Path, model: Path, pixels: "Tensor", expected: "Tensor") -> bool:
    """Whether a fresh process, without this package, computes the same last hidden states and CLS tokens."""
    import torch
    from safetensors.torch import load_file, save_file

    inputs, outputs = data / "reload_inputs.safetensors", data / "reload_outputs.safetensors"
    save_file({"pixel_values": pixels}, inputs)
    command = [sys.executable, "-c", RELOAD, str(model), str(inputs), str(outputs)]
    loaded_as = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    found = load_file(outputs)
    same = torch.equal(found["last_hidden_state"], expected) and torch.equal(found["pooler_output"], expected[:, 0])
    print(f"reloaded in a fresh process as {loaded_as}: features {'bit-equal' if same else 'DIFFER'}")
    return same


def compress(data: Path, model: Path, small: Path) -> bool:
    """Remove one block of the trained network and show what that does; whether it reloads as stock transformers."""
    import torch
    from datasets import load_dataset
    from transformers import AutoImageProcessor, AutoModel

    from hf_simprune.evaluation.features import extract_features
    from hf_simprune.evaluation.knn import knn_accuracy

    command = [sys.executable, str(RECIPES / "compress.py"), "--model_name_or_path", str(model)]
    command += ["--dataset", str(data), "--eval_split", "test", "--remove_blocks", "1", "--output", str(small)]
    command += ["--overwrite_output_dir"]
    print("\n$", " ".join(command[1:]), flush=True)
    started = time.time()
    status = subprocess.run(command).returncode
    if status:
        sys.exit(f"compression stopped with status {status}")
    print(f"compression took {time.time() - started:.0f} s")
    sets = load_dataset("parquet", data_files={s: str(data / f"{s}.parquet") for s in ("train", "test")})
    images = {name: [image.convert("RGB") for image in sets[name]["image"]] for name in sets}
    labels = {name: torch.tensor(sets[name]["label"]) for name in sets}
    processor = AutoImageProcessor.from_pretrained(small, backend="pil")
    print(f"\nk-NN accuracy on {len(labels['test'])} test images, all {len(labels['train'])} labels")
    for title, folder in (("trained network", model), ("one block fewer", small)):
        network = AutoModel.from_pretrained(folder)
        found = {s: extract_features(network, images[s], processor, progress=False)["cls"] for s in images}
        accuracy = knn_accuracy(found["train"], labels["train"], found["test"], labels["test"])
        print(f"{title:18}{network.config.num_hidden_layers:>3} blocks{100 * accuracy:>8.1f} %")
    pixels = processor(images=images["test"][:64], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = AutoModel.from_pretrained(small).eval()(pixels)
    return loads_elsewhere(data, small, pixels, expected.last_hidden_state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="where everything is written")
    parser.add_argument("--config", type=Path, default=RECIPES / "digits_demo.yaml", help="settings of the training")
    arguments, extra = parser.parse_known_args()
    data, model = arguments.output_dir / "data", arguments.output_dir / "model"
    data.mkdir(parents=True, exist_ok=True)
    write_digits(data)
    started = time.time()
    train(arguments.config, data, model, extra)
    print(f"training with k-NN and export took {time.time() - started:.0f} s")
    better = compare(data, model)
    same = reload_elsewhere(data, model)
    same &= compress(data, model, arguments.output_dir / "compressed")
    print(f"\nmodel and card: {model}")
    print(f"one block less: {arguments.output_dir / 'compressed'}, with redundancy.png")
    print(f"pictures:       {model / 'loss_curve.png'}, {model / 'pruned_tokens.png'}")
    if not better:
        sys.exit("the trained network does not beat the random one")
    if not same:
        sys.exit("reloaded features differ from those of the network that was saved")


if __name__ == "__main__":
    main()
