# SPDX-License-Identifier: Apache-2.0
"""`hf-simprune push`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..options.fields import option
from ..options.parsing import Options


@dataclass(kw_only=True)
class PushArguments:
    """What is published, and where."""

    _argument_group_name = "publishing"

    folder: str | None = option(None, "Folder that a training or a compression wrote.")
    repo_id: str | None = option(None, "Repository, user/name; by default the folder's name, in your namespace.")
    private: bool = option(False, "Make a new repository private.")
    create_pr: bool = option(False, "Open a pull request and leave the branch as it is.")
    revision: str | None = option(None, "Branch to push to (main).")
    message: str | None = option(None, "Of the commit.")
    token: str | None = option(None, "Hub token; by default the one stored by `hf auth login`.")


OPTIONS = Options(
    kind=PushArguments,
    groups=(PushArguments,),
    description="Publish a finished folder on the Hub: weights, configuration, image processor, card, pictures, and "
    "code where the model needs it. Checkpoints and logs stay here. What is already there is not sent again, and the "
    "same content makes no second commit.",
    required=("folder",),
    positional=("folder", "repo_id"),
    prog="hf-simprune push",
    examples=(
        "hf-simprune push outputs/smaller user/my-model",
        "hf-simprune push outputs/smaller user/my-model --private",
        "hf-simprune push outputs/smaller owner/model --create_pr",
    ),
    json=True,
)


def run(args: PushArguments) -> dict[str, Any]:
    """Publish; returns where it went."""
    if not Path(str(args.folder)).expanduser().is_dir():
        raise InputError(f"--folder {args.folder}: there is no such folder")
    from ..hub.publish import publish

    found = publish(
        Path(str(args.folder)).expanduser(),
        args.repo_id,
        private=args.private,
        create_pr=args.create_pr,
        revision=args.revision,
        token=args.token,
        message=args.message,
    )
    for warning in found.warnings:
        print(f"warning: {warning}")
    if found.left_out:
        print(f"not published: {', '.join(found.left_out)}")
    if found.unchanged:
        print(f"{found.url} holds this content already: no commit was made")
    else:
        print(f"published at {found.pr_url or found.url}")
    return asdict(found)
