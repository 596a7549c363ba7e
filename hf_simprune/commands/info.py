# SPDX-License-Identifier: Apache-2.0
"""`hf-simprune info`."""

from dataclasses import dataclass
from typing import Any

from ..options.common import ALIASES, CheckpointArguments, HubReadingArguments
from ..options.parsing import Options


@dataclass(kw_only=True)
class InfoArguments(CheckpointArguments, HubReadingArguments):
    """Every option of `hf-simprune info`."""

    _argument_group_name = "info"


OPTIONS = Options(
    kind=InfoArguments,
    groups=(CheckpointArguments, HubReadingArguments),
    description="Say what a model is: class, blocks kept, removed and replaced, token reduction, parameters, FLOPs, "
    "file size, and where it came from. Reads the configuration and the headers of the weight files, no weights.",
    required=("model_name_or_path",),
    aliases=ALIASES,
    positional=("model_name_or_path",),
    prog="hf-simprune info",
    examples=(
        "hf-simprune info outputs/smaller",
        "hf-simprune info facebook/deit-tiny-patch16-224 --json",
    ),
    json=True,
)


def run(args: InfoArguments) -> dict[str, Any]:
    """Describe; returns the description."""
    from ..evaluation.model_files import open_files

    files = open_files(str(args.model_name_or_path), args.model_revision, args.token)
    from ..evaluation.description import describe
    from ..terminal import bold

    description = describe(files)
    print(bold(files.place) + (f" ({files.commit})" if files.commit else ""))
    rows = description.rows()
    width = max(len(what) for what, _ in rows)
    for what, value in rows:
        print(f"{what.ljust(width)}  {value}")
    return description.to_dict()
