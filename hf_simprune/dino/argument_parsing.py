# SPDX-License-Identifier: Apache-2.0
"""From a YAML file and the command line to `DinoArguments`. Imports no torch, so that `--help` is quick."""

from ..options.common import ALIASES
from ..options.parsing import Options
from .arguments import ARGUMENT_GROUPS, DinoArguments


TRAINING_OPTIONS = Options(
    kind=DinoArguments,
    groups=ARGUMENT_GROUPS,
    description="Pretrain a vision transformer with DINO or DINOv2 and SimPrune. Values in brackets are chosen when "
    "an option is not given; what was chosen is printed at start.",
    required=("output_dir", "dataset_name_or_path"),
    aliases=ALIASES,
    prog="hf-simprune train",
    examples=(
        "hf-simprune train --dataset path/to/images --architecture vit_small --output trained",
        "accelerate launch recipes/train_dino.py --config recipes/cifar10_vit_micro.yaml --dataset path/to/images",
    ),
    json=True,
)
parse_arguments = TRAINING_OPTIONS.parse
read_config = TRAINING_OPTIONS.read_config
