# SPDX-License-Identifier: Apache-2.0
"""The command `hf-simprune`: one subcommand a job. Imports no torch before the options are read."""

import difflib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from . import __version__
from .commands import COMMANDS
from .errors import InputError, TrainingError, TrainingInterrupted
from .lasting_output import forget_unwritten
from .terminal import bold, red


EXIT_CODES = {
    0: "done",
    1: "the run could not go on, or an upload failed; the message says what was kept",
    2: "an option, a file or a model is not what it should be; nothing was done",
    130: "interrupted (Ctrl-C or SIGTERM); the message says what was kept",
}
_EXAMPLES = (
    "hf-simprune train --config recipes/digits_demo.yaml --dataset path/to/images --output trained",
    "hf-simprune compress MODEL --dataset path/to/images --remove-blocks 2 --output compressed",
    "hf-simprune evaluate compressed --baseline MODEL --dataset path/to/images",
    "hf-simprune push compressed user/my-model",
)
_BROKEN_PIPE = 128 + 13  # what a shell gives for SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The exit status, one of `EXIT_CODES`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in ([], ["-h"], ["--help"]):
        return _show(_usage(), 0 if words else 2)
    if words[0] in ("-V", "--version"):
        return _show(f"hf-simprune {__version__}", 0)
    return run_command(words[0], words[1:])


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
    """Run the subcommand `name`; errors are one line on stderr. Returns the exit status as `main` does."""
    # Threads that sleep while they wait: spinning ones slow a CPU that other programs use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = list(sys.argv[1:] if argv is None else argv)
    words = [word for word in given if word != "--json"]
    for_machines = len(words) < len(given)
    try:
        if name not in COMMANDS:
            raise InputError(f"unknown command {name}{_closest(name)}")
        command = import_module(f".commands.{name}", __package__)
        args = command.OPTIONS.parse(words)
        # training has handlers of its own: it ends between two steps
        with (
            nullcontext() if name == "train" else _sigterm_as_ctrl_c(),
            _to_stderr() if for_machines else nullcontext(),
        ):
            record = command.run(args)
        # what a training makes is on the disk: that nobody takes its words is no failure
        with suppress(OSError) if name == "train" else nullcontext():
            if for_machines and os.environ.get("RANK", "0") == "0":
                print(_as_json(record))
            sys.stdout.flush()
    except InputError as error:
        return _stop(f"error: {error}", 2)
    except TrainingError as error:
        return _stop(f"error: {error}", 1, every_process=error.known_to_one)
    except TrainingInterrupted as error:
        return _stop(str(error), 130)
    except KeyboardInterrupt:
        return _stop(COMMANDS[name].interrupted, 130)
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        return _BROKEN_PIPE
    finally:
        forget_unwritten()
    return 0


def _show(text: str, status: int) -> int:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        return _BROKEN_PIPE
    finally:
        forget_unwritten()
    return status


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Within it the first SIGTERM raises KeyboardInterrupt, and those that follow leave the cleaning up alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a child that inherited this: it ends as it would have
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _to_stderr() -> Iterator[None]:
    """Everything printed goes to standard error, whoever prints it: this process, a library in C, or a child."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _as_json(record: Mapping[str, Any] | Path) -> str:
    if isinstance(record, Path):
        record = json.loads(record.read_text(encoding="utf-8"))
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: hf-simprune COMMAND [option ...]",
            "",
            bold("commands:"),
            *(f"  {name.ljust(width)}  {command.summary}" for name, command in COMMANDS.items()),
            "",
            bold("examples:"),
            *(f"  {example}" for example in _EXAMPLES),
            "",
            bold("exit status:"),
            *(f"  {code:<{width}}  {meaning}" for code, meaning in EXIT_CODES.items()),
            "",
            "Options of a command: hf-simprune COMMAND --help. With --json a command prints one JSON object on",
            "standard output and nothing else. NO_COLOR turns colours off.",
            "hf simprune COMMAND works only where this is installed as an extension of the Hub's command line, by",
            "hf extensions install OWNER/hf-simprune (a GitHub repository of that name); pip alone does not do that.",
        ]
    )


def _closest(name: str) -> str:
    matches = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"; did you mean {matches[0]}?" if matches else f": choose one of {', '.join(COMMANDS)}"


def _stop(message: str, status: int, every_process: bool = False) -> int:
    # nearly always every process of a machine meets the same error; one says it
    if every_process or os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):  # the exit status tells, even where a full disk takes no words
            print(red(" ".join(message.split()), sys.stderr), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
