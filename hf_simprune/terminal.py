# SPDX-License-Identifier: Apache-2.0
"""Colour for terminals that want it, and none in a pipe. Imports nothing heavy."""

import os
import re
import sys
from typing import IO


_BOLD, _DIM, _RED, _END = "\033[1m", "\033[2m", "\033[31m", "\033[0m"
_RULE = re.compile(r"-+(  -+)+")


def wants_colour(stream: IO[str] | None = None) -> bool:
    """Whether text for `stream` (standard output if left out) may carry colours.

    `NO_COLOR` says no and `FORCE_COLOR` yes, where they are set and not empty (https://no-color.org); else a terminal
    says yes, unless it is a dumb one.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return (stream or sys.stdout).isatty() and os.environ.get("TERM") != "dumb"


def highlighted(text: str, colour: bool | None = None) -> str:
    """`text` with its tables' titles and column names bold and their rules dim, or as it is without `colour`.

    A table is what `hf_simprune.rba.report.text_table` makes: perhaps a title, a line of names, a line of dashes.
    """
    if not (wants_colour() if colour is None else colour):
        return text
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if _RULE.fullmatch(line):
            lines[number] = f"{_DIM}{line}{_END}"
            for above in (number - 1, number - 2):
                if above >= 0 and lines[above].strip() and not lines[above].startswith("\033"):
                    lines[above] = f"{_BOLD}{lines[above]}{_END}"
    return "\n".join(lines)


def bold(text: str, colour: bool | None = None) -> str:
    """Bold where `colour`, or standard output, wants it."""
    return f"{_BOLD}{text}{_END}" if (wants_colour() if colour is None else colour) else text


def red(text: str, stream: IO[str]) -> str:
    """Red where `stream` wants colours."""
    return f"{_RED}{text}{_END}" if wants_colour(stream) else text
