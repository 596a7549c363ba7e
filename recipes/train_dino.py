# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-simprune[tensorboard]"]
#
# [tool.uv.sources]
# hf-simprune = { path = "..", editable = true }
# ///
"""Pretrain a ViT with DINO while SimPrune drops tokens in both branches.

A folder of images, the published DINO settings (see recipes/imagenet_vit_small.yaml):

    accelerate launch recipes/train_dino.py \
        --config recipes/imagenet_vit_small.yaml \
        --dataset_name_or_path path/to/images \
        --output_dir outputs/vit-small-dino

CIFAR-10 from parquet on a CPU, with local crops, keeping 70 % of the tokens at each stage:

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/train_dino.py \
        --config recipes/cifar10_vit_micro.yaml \
        --dataset_name_or_path path/to/cifar10.parquet

The same without token reduction, then with tokens dropped at random:

    python recipes/train_dino.py --config recipes/cifar10_vit_micro.yaml \
        --dataset_name_or_path path/to/cifar10.parquet --token_reduction none --output_dir outputs/cifar10-dense
    python recipes/train_dino.py --config recipes/cifar10_vit_micro.yaml \
        --dataset_name_or_path path/to/cifar10.parquet --token_reduction random --output_dir outputs/cifar10-random

Go on after Ctrl-C: the same command with --resume_from_checkpoint latest. `hf-simprune train` takes the same options.
All of them: --help.
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit status: 0, 2 for bad input, 1 for a run that cannot go on, 130 when interrupted."""
    from hf_simprune.cli import run_command

    return run_command("train", argv)


if __name__ == "__main__":
    sys.exit(main())
