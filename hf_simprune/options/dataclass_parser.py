# SPDX-License-Identifier: Apache-2.0
"""Option dataclasses as arguments of an `argparse` parser.

`transformers.HfArgumentParser` does the same, but importing transformers takes longer than `--help` may.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, get_args, get_origin


_METAVARS = {bool: "BOOL", int: "N", float: "X", str: "TEXT"}
NONE_WORDS = ("none", "null")
_WORDS = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown, but for None, which the text describes in brackets; paragraphs stay as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, argparse.SUPPRESS) else super()._get_help_string(action)


def add_options(
    parser: argparse.ArgumentParser, kind: type, hints: Mapping[str, Any], notes: Mapping[str, str]
) -> None:
    """Add the fields of the dataclass `kind` as one group, none of them required.

    Args:
        hints: type of every field: bool, int, float, str, a list of one of these, or one of all these and None.
        notes: what to say after a field's help, by its name.
    """
    group = parser.add_argument_group(getattr(kind, "_argument_group_name", kind.__name__))
    for entry in fields(kind):
        text = " ".join(filter(None, (entry.metadata.get("help", ""), notes.get(entry.name))))
        _add(group, entry, hints[entry.name], text)


def bare_switches_as_true(argv: Sequence[str], switches: Sequence[str]) -> list[str]:
    """`--switch` becomes `--switch=true` where no boolean word follows: it takes no bare word as its value."""
    options = {f"--{name}" for name in switches}
    following = [*argv[1:], ""]
    return [
        f"{word}=true" if word in options and after.lower() not in _WORDS else word
        for word, after in zip(argv, following)
    ]


def plain_type(hint: Any) -> tuple[Any, bool, bool]:
    """(bool, int, float or str; whether it is a list of them; whether it may be None)."""
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    optional = type(None) in get_args(hint)
    kind = kinds[0] if optional else hint
    if get_origin(kind) is list:
        return get_args(kind)[0], True, optional
    return kind, False, optional


def _add(group: Any, entry: Field[Any], hint: Any, text: str) -> None:
    kind, several, optional = plain_type(hint)
    convert = _boolean if kind is bool else kind
    settings: dict[str, Any] = {
        "default": _default(entry),
        "help": text,
        "type": _or_none(convert) if optional else convert,
        "metavar": "|".join(entry.metadata.get("choices", ())) or _METAVARS[kind],
    }
    if several:
        settings["nargs"] = "+"
    elif kind is bool and not optional:
        settings |= {"nargs": "?", "const": True}
    group.add_argument(f"--{entry.name}", **settings)
    if kind is bool and settings["default"] is True:
        group.add_argument(
            f"--no_{entry.name}",
            dest=entry.name,
            action="store_false",
            default=argparse.SUPPRESS,
            help=f"Same as --{entry.name} false.",
        )


def _default(entry: Field[Any]) -> Any:
    if entry.default_factory is not MISSING:
        return entry.default_factory()
    return None if entry.default is MISSING else entry.default


def _boolean(text: str) -> bool:
    if text.lower() not in _WORDS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return _WORDS[text.lower()]


def _or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """`none` stays a word: whether it may stand there is judged once all words of the option are read."""

    def converter(text: str) -> Any:
        return text.lower() if text.lower() in NONE_WORDS else convert(text)

    converter.__name__ = convert.__name__  # argparse names it when a value is refused
    return converter
