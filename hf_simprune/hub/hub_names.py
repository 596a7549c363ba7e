# SPDX-License-Identifier: Apache-2.0
"""Names that the Hub knows: licences, pipeline tags, relations to a base model. Imports no torch, asks no server."""

import json
import re
from functools import cache
from importlib.resources import files
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


_LISTS = files("hf_simprune.hub") / "hub_names.json"


@cache
def hub_names(kind: str) -> tuple[str, ...]:
    """The names of one kind that a card may use: licenses, pipeline_tags, base_model_relations, libraries, metrics.

    They are those of the Hub's documentation (hub-docs and huggingface.js, August 2026); of libraries and metrics only
    those that this package writes.
    """
    return tuple(json.loads(_LISTS.read_text(encoding="utf-8"))[kind])


def is_repo_id(name: object) -> bool:
    """Whether `name` could be a repository on the Hub: `name` or `owner/name`, well formed."""
    if not isinstance(name, str):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_hub_id(name: str | None) -> bool:
    """Whether `name` is a Hub repository rather than something on this disk."""
    return name is not None and not Path(name).expanduser().exists() and name.count("/") <= 1


def slug(text: str) -> str:
    """`text` with nothing but letters, digits, `_`, `.` and `-`, for places where the Hub wants an identifier."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-")
