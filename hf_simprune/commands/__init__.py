# SPDX-License-Identifier: Apache-2.0
"""One file a command of `hf-simprune`. Each has `OPTIONS`, and `run`, which returns what `--json` prints.

A record is returned as it is, or as the JSON file that holds it. Importing these files imports no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One line of `hf-simprune --help`.

    Attributes:
        summary: what it does.
        interrupted: what to say after Ctrl-C.
    """

    summary: str
    interrupted: str = "interrupted"


COMMANDS = {
    "train": Command(
        "pretrain a vision transformer on your images (DINO with SimPrune)",
        "interrupted; if there is a checkpoint yet, --resume_from_checkpoint latest goes on from it",
    ),
    "analyze": Command(
        "measure which blocks of a vision transformer matter on your images", "interrupted; nothing was written"
    ),
    "compress": Command("remove the blocks that matter least, within a budget", "interrupted; nothing was written"),
    "evaluate": Command("k-NN, linear probe, top-1, FLOPs and latency, beside another model if you like"),
    "push": Command(
        "publish a finished folder on the Hub", "interrupted; the folder is as it was, and the same command goes on"
    ),
    "info": Command("say what a model is, without reading its weights"),
    "explore": Command("look at tokens, blocks and attention of a model in the browser"),
    "completion": Command("print shell completion for bash, zsh or fish"),
}
