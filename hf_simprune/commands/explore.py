# SPDX-License-Identifier: Apache-2.0
"""`hf-simprune explore`."""

import shlex
from dataclasses import dataclass, fields
from typing import Any

from ..errors import InputError
from ..explore.images import ImageSource
from ..options.common import ALIASES, CheckpointArguments, HubReadingArguments, check_revision
from ..options.fields import option
from ..options.parsing import Options


_PORTS = range(1, 2**16)


@dataclass(kw_only=True)
class ExploredImages:
    """Images to begin with and to measure redundancy on, if you like."""

    _argument_group_name = "images"

    dataset_name_or_path: str | None = option(None, "Hub name, parquet file, or a folder.")
    dataset_config_name: str | None = option(None, "Configuration of a Hub data set.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub data set.")
    split: str | None = option(None, "Split of it (train).")
    image_column: str | None = option(None, "Column of the images; needed where several would do.")


@dataclass(kw_only=True)
class PageArguments:
    """Where the page is shown."""

    _argument_group_name = "page"

    port: int = option(7860, "Port of this machine that the page is served at.")
    open_browser: bool = option(True, "Open the page in the browser.")
    space: str | None = option(None, "Write the folder of a Hub Space with this page there, and serve nothing.")


@dataclass(kw_only=True)
class ExploreArguments(CheckpointArguments, ExploredImages, PageArguments, HubReadingArguments):
    """Every option of `hf-simprune explore`."""

    _argument_group_name = "explore"


OPTIONS = Options(
    kind=ExploreArguments,
    groups=(CheckpointArguments, ExploredImages, PageArguments, HubReadingArguments),
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
    check_revision("model_revision", args.model_revision, model)
    dataset = args.dataset_name_or_path
    for name in (entry.name for entry in fields(ExploredImages)):
        if getattr(args, name) is not None and dataset is None:
            raise InputError(f"--{name} {getattr(args, name)}: there is no --dataset that could have it")
    source = None
    if dataset is not None:
        source = ImageSource(
            dataset,
            config_name=args.dataset_config_name,
            revision=args.dataset_revision,
            split=args.split,
            image_column=args.image_column,
            token=args.token,
        )
    if args.space is not None:
        from ..explore.space import write_space

        folder = write_space(args.space, model, source, model_revision=args.model_revision)
        print(f"{folder} is a Space. Look at it here: cd {shlex.quote(str(folder))} && python app.py")
        words = shlex.join(["hf", "upload", folder.resolve().name, str(folder), ".", "--type", "space"])
        print(f"Upload it: {words}")
        return {"model": model, "space": args.space}
    from ..explore.app import launch

    launch(
        model,
        source,
        model_revision=args.model_revision,
        token=args.token,
        port=args.port,
        open_browser=args.open_browser,
    )
    return {"model": model, "port": args.port}
