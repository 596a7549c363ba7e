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

Go on after Ctrl-C: the same command with --resume_from_checkpoint latest. All options: --help.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress


# Threads that sleep while they wait: spinning ones make steps many times slower on a CPU that other programs use too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit status: 0, 2 for bad input, 1 for a run that cannot go on, 130 when interrupted."""
    # Heavy imports come late, so that --help and a mistyped option answer at once.
    from hf_simprune.errors import InputError, TrainingError, TrainingInterrupted
    from hf_simprune.lasting_output import forget_unwritten

    try:
        from hf_simprune.dino.argument_parsing import parse_arguments

        args = parse_arguments(argv)

        from hf_simprune.dino.run import run_training

        run_training(args)
    except InputError as error:
        return _stop(f"error: {error}", 2)
    except TrainingError as error:
        from hf_simprune.dino.processes import LostProcessError

        # the process that would speak may be the lost one
        return _stop(f"error: {error}", 1, every_process=isinstance(error, LostProcessError))
    except TrainingInterrupted as error:
        return _stop(str(error), 130)
    except KeyboardInterrupt:
        return _stop("interrupted; if there is a checkpoint yet, --resume_from_checkpoint latest goes on from it", 130)
    finally:
        forget_unwritten()
    return 0


def _stop(message: str, status: int, every_process: bool = False) -> int:
    # nearly always every process of a machine meets the same error; one says it
    if every_process or os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):  # the exit status tells, even where a full disk takes no words
            print(" ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
