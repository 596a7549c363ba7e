# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-simprune"]
#
# [tool.uv.sources]
# hf-simprune = { path = "..", editable = true }
# ///
"""Remove the blocks of a vision transformer that your images do not need: analyse, plan, convert, evaluate, save.

DeiT-Tiny without two of its twelve blocks, on any folder or parquet file of images:

    accelerate launch recipes/compress.py \
        --config recipes/compress_deit_tiny.yaml \
        --dataset path/to/images

At most 80 % of the FLOPs, halves of blocks removed where that costs less:

    python recipes/compress.py --model_name_or_path path/or/hub-name --dataset path/to/images \
        --max_flops 0.8x --granularity half --output outputs/smaller

A plan written by hand (see `hf_simprune.rba.plan`):

    python recipes/compress.py --model_name_or_path path/or/hub-name --dataset path/to/images \
        --plan plan.json --output outputs/smaller

`hf-simprune compress` takes the same options. All of them: --help.
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Compress; returns the exit status: 0, 2 for bad input, 1 for a run that cannot go on, 130 when interrupted."""
    from hf_simprune.cli import run_command

    return run_command("compress", argv)


if __name__ == "__main__":
    sys.exit(main())
