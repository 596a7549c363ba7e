# SPDX-License-Identifier: Apache-2.0
"""`hf-simprune explore`."""

from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..options.common import ALIASES
from ..options.fields import option
from ..options.parsing import Options


_PORTS = range(1, 2**16)


@dataclass(kw_only=True)
class ExploreArguments:
    """What is shown, and where."""

    _argument_group_name = "page"

    model_name_or_path: str | None = option(None, "Hub name or folder of the network.")
    dataset_name_or_path: str | None = option(
        None, "Images to begin with and to measure redundancy on: Hub name, parquet file, or a folder."
    )
    split: str | None = option(None, "Split of it.")
    port: int = option(7860, "Port of this machine that the page is served at.")
    open_browser: bool = option(True, "Open the page in the browser.")
    space: str | None = option(None, "Write the folder of a Hub Space with this page there, and serve nothing.")


OPTIONS = Options(
    kind=ExploreArguments,
    groups=(ExploreArguments,),
    description="A page in the browser: upload an image, see which tokens two augmented views keep as the curriculum "
    "moves, which blocks are redundant, and what removing some of them does. Needs the extra explore: "
    "pip install hf-simprune[explore].",
    required=("model_name_or_path",),
    aliases={name: option for name, option in ALIASES.items() if name == "dataset"},
    positional=("model_name_or_path",),
    prog="hf-simprune explore",
    examples=(
        "hf-simprune explore outputs/vit-small-dino --dataset path/to/images",
        "hf-simprune explore facebook/deit-tiny-patch16-224 --space my-space",
    ),
    json=True,
)


def run(args: ExploreArguments) -> dict[str, Any]:
    """Serve the page until Ctrl-C, or write a Space; returns what was done."""
    model = str(args.model_name_or_path)
    if args.port not in _PORTS:
        raise InputError(f"--port {args.port}: must be from 1 to {_PORTS[-1]}")
    if args.split is not None and args.dataset_name_or_path is None:
        raise InputError(f"--split {args.split}: there is no --dataset that could have it")
    if args.space is not None:
        from ..explore.space import write_space

        write_space(args.space, model, args.dataset_name_or_path, split=args.split)
        return {"model": model, "space": args.space}
    from ..explore.app import launch

    launch(model, args.dataset_name_or_path, split=args.split, port=args.port, open_browser=args.open_browser)
    return {"model": model, "port": args.port}
