# SPDX-License-Identifier: Apache-2.0
"""The command `hf-simprune`: one subcommand a job. Imports no torch before the options are read."""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import __version__
from .errors import InputError, TrainingError


@dataclass(frozen=True)
class _Command:
    summary: str
    run: Callable[[Sequence[str]], None]


def _analyze(argv: Sequence[str]) -> None:
    from .rba.arguments import ANALYZE_OPTIONS, validate_analysis

    args = ANALYZE_OPTIONS.parse(argv)
    validate_analysis(args)
    from .rba.run import run_analyze

    run_analyze(args)


def _compress(argv: Sequence[str]) -> None:
    from .rba.arguments import COMPRESS_OPTIONS, validate_compression

    args = COMPRESS_OPTIONS.parse(argv)
    validate_compression(args)
    from .rba.run import run_compress

    run_compress(args)


_COMMANDS = {
    "analyze": _Command("measure which blocks of a vision transformer matter on your images", _analyze),
    "compress": _Command("remove the blocks that matter least, within a budget", _compress),
}
_EXAMPLE = "hf-simprune compress MODEL --dataset path/to/images --remove-blocks 2 --output compressed"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The exit status: 0, 2 for bad input, 1 for a run that cannot go on, 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in ([], ["-h"], ["--help"]):
        print(_usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"hf-simprune {__version__}")
        return 0
    return run_command(words[0], words[1:])


def run_command(name: str, argv: Sequence[str]) -> int:
    """Run the subcommand `name`; errors are one line on stderr. Returns the exit status as `main` does."""
    # Threads that sleep while they wait: spinning ones slow a CPU that other programs use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if name not in _COMMANDS:
            raise InputError(f"unknown command {name}{_closest(name)}")
        _COMMANDS[name].run(argv)
    except InputError as error:
        return _stop(f"error: {error}", 2)
    except TrainingError as error:
        return _stop(f"error: {error}", 1)
    except KeyboardInterrupt:
        return _stop("interrupted; nothing was written", 130)
    return 0


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    lines = [f"  {name.ljust(width)}  {command.summary}" for name, command in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: hf-simprune COMMAND [option ...]",
            "",
            *lines,
            "",
            "Options of a command: hf-simprune COMMAND --help",
            f"Example: {_EXAMPLE}",
        ]
    )


def _closest(name: str) -> str:
    matches = difflib.get_close_matches(name, _COMMANDS, n=1)
    return f"; did you mean {matches[0]}?" if matches else f": choose one of {', '.join(_COMMANDS)}"


def _stop(message: str, status: int) -> int:
    # nearly always every process of a machine meets the same error; one says it
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(" ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
