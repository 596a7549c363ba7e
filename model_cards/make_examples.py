# SPDX-License-Identifier: Apache-2.0
"""The finished example cards, made by real runs.

    python model_cards/make_examples.py --deit path/to/deit-tiny-patch16-224 --imagenet path/to/imagenet_images.parquet

pretrained: a ViT-micro learns from scikit-learn's handwritten digits (DINO, SimPrune), as `make demo` does it.
compressed: the ImageNet DeiT-Tiny without two of its twelve blocks. Runs take place in an empty folder that holds
checkpoint and images under the names they have on the Hub, so that the commands in the cards are those a user types.
Cards, pictures and `.eval_results` are copied to `model_cards/examples/`; a card with a fault stops the script.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "model_cards" / "examples"
PRETRAINED, COMPRESSED = "vit-micro-digits", "deit-tiny-10-blocks"
DEIT = "facebook/deit-tiny-patch16-224"
IMAGENET = "imagenet-sample-500.parquet"
DIGITS = "handwritten-digits"


def train(work: Path) -> None:
    """Write the digits, train on them, as recipes/demo.py does."""
    sys.path.insert(0, str(ROOT / "recipes"))
    from demo import write_digits

    (work / DIGITS).mkdir()
    write_digits(work / DIGITS)
    command = ["recipes/train_dino.py", "--config", "recipes/digits_demo.yaml", "--dataset_name_or_path", DIGITS]
    command += ["--output_dir", PRETRAINED, "--license", "apache-2.0", "--disable_tqdm"]
    run(work, command)


def compress(work: Path) -> None:
    """Remove two blocks."""
    command = ["recipes/compress.py", "--config", "recipes/compress_deit_tiny.yaml", "--dataset", IMAGENET]
    command += ["--base_model_id", DEIT, "--dataset_id", "ILSVRC/imagenet-1k", "--license", "apache-2.0"]
    command += ["--output_dir", COMPRESSED, "--disable_tqdm"]
    run(work, command)


def run(work: Path, command: list[str]) -> None:
    """A recipe in a process of its own, in `work`."""
    print("$ python", *command, flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    status = subprocess.run([sys.executable, *command], cwd=work, env=environment).returncode
    if status:
        sys.exit(f"the run ended with status {status}")


def keep(folder: Path) -> None:
    """Copy the card and the pictures that it shows, once it is sound."""
    from hf_simprune.hub.card_check import check_card, missing_parts

    text = (folder / "README.md").read_text(encoding="utf-8")
    faults = [*check_card(text, folder), *(f"it lacks {part}" for part in missing_parts(text))]
    faults += [f"it names {path}" for path in (str(folder.parent), str(ROOT)) if path in text]
    if faults:
        sys.exit("\n".join([f"the card of {folder.name} is not sound:", *faults]))
    target = EXAMPLES / folder.name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in [folder / "README.md", *folder.glob("*.png")]:
        if path.name in text or path.suffix == ".md":
            shutil.copy(path, target)
    print(f"{target.relative_to(ROOT)}: {', '.join(sorted(path.name for path in target.iterdir()))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deit", type=Path, help="folder of the DeiT-Tiny checkpoint; no compressed example without")
    parser.add_argument("--imagenet", type=Path, help="parquet file of ImageNet images with their labels")
    parser.add_argument("--only", choices=(PRETRAINED, COMPRESSED), help="make one of the two")
    arguments = parser.parse_args()
    if arguments.only != PRETRAINED and None in (arguments.deit, arguments.imagenet):
        parser.error(f"--deit and --imagenet are needed for {COMPRESSED}; or use --only {PRETRAINED}")
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "recipes").symlink_to(ROOT / "recipes")
        if arguments.only != COMPRESSED:
            train(work)
            keep(work / PRETRAINED)
        if arguments.only != PRETRAINED:
            (work / DEIT).parent.mkdir()
            (work / DEIT).symlink_to(arguments.deit.resolve())
            (work / IMAGENET).symlink_to(arguments.imagenet.resolve())
            compress(work)
            keep(work / COMPRESSED)


if __name__ == "__main__":
    main()
