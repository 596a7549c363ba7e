# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-simprune"]
#
# [tool.uv.sources]
# hf-simprune = { path = "..", editable = true }
# ///
"""Say how good a vision transformer is on your labelled images, and what it costs.

k-NN, linear probe, top-1 of its own head, parameters, FLOPs and latency; a third of the images is held out:

    python recipes/evaluate.py path/or/hub-name --dataset path/to/images

A compressed network beside its original, with paired 95 % intervals:

    python recipes/evaluate.py outputs/smaller --baseline facebook/deit-tiny-patch16-224 \
        --dataset path/to/images --eval_split validation

`hf-simprune evaluate` takes the same options. All of them: --help.
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    from hf_simprune.cli import run_command

    return run_command("evaluate", argv)


if __name__ == "__main__":
    sys.exit(main())
