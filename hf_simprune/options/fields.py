# SPDX-License-Identifier: Apache-2.0
"""Fields of an option dataclass: a default and the line that `--help` shows."""

from collections.abc import Sequence
from dataclasses import field
from typing import Any


def option(default: Any, text: str, choices: Sequence[str] = ()) -> Any:
    """An option with a default. `choices` are shown and offered by shell completion; the option's reader judges."""
    return field(default=default, metadata={"help": text, "choices": tuple(choices)})


def values(default: Sequence[Any], text: str) -> Any:
    """An option that takes several values."""
    return field(default_factory=lambda: list(default), metadata={"help": text})


def required(text: str) -> Any:
    """An option without a default."""
    return field(metadata={"help": text})
