# SPDX-License-Identifier: Apache-2.0
"""From a YAML file and the command line to a dataclass of options. Imports no torch, so that `--help` is quick."""

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, get_type_hints

import yaml

from ..errors import InputError
from .dataclass_parser import NONE_WORDS, HelpFormatter, add_options, bare_switches_as_true, plain_type


T = TypeVar("T")
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text (put it in quotes)"}
JSON_HELP = "Print one JSON object on standard output and nothing else; all other lines go to standard error."


@dataclass(frozen=True, kw_only=True)
class Options(Generic[T]):
    """What a command takes, and how it is read.

    Attributes:
        kind: The dataclass that is made; its fields are the options.
        groups: Dataclasses that hold its fields between them, in the order `--help` shows them.
        description: First lines of `--help`.
        required: Options that the command line or the YAML file must give.
        aliases: Other names, such as {"output": "output_dir"}.
        positional: Options that may be given as bare words, in this order.
        prog: Name of the command in `--help`; by default the script's.
        examples: Commands that `--help` ends with.
        json: `--help` names the switch `--json`, which the command line takes before the options are read.
    """

    kind: type[T]
    groups: Sequence[type]
    description: str
    required: Sequence[str] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    positional: Sequence[str] = ()
    prog: str | None = None
    examples: Sequence[str] = ()
    json: bool = False

    @cached_property
    def hints(self) -> dict[str, Any]:
        """Type of every option."""
        return {name: hint for name, hint in get_type_hints(self.kind).items() if not name.startswith("_")}

    def parse(self, argv: Sequence[str] | None = None) -> T:
        """Options from `--config file.yaml` and `argv` (default `sys.argv[1:]`); the command line wins.

        Hyphens and underscores both work. `none` takes back a value of the file where an option may be empty.

        Raises:
            InputError: an unknown option, a value of the wrong type, an unreadable file, a required option missing.
        """
        argv = [self._canonical(argument) for argument in (sys.argv[1:] if argv is None else argv)]
        hints = self.hints
        if self.positional:
            argv = bare_switches_as_true(argv, [n for n in hints if plain_type(hints[n]) == (bool, False, False)])
        parser = self.parser()
        if not {"-h", "--help"} & set(argv):
            config = _config_parser().parse_known_args(argv)[0].config
            if config is not None:
                parser.set_defaults(**self.read_config(Path(config)))
        namespace, rest = parser.parse_known_args(argv)
        if rest:
            self._take_positional(namespace, rest, argv)
        values = {
            name: _without_none_word(name, value, hints[name])
            for name, value in vars(namespace).items()
            if name != "config"
        }
        for name in self.required:
            if not values[name]:
                words = f"{name.upper()}, or --{name}," if name in self.positional else f"--{name}"
                raise InputError(f"{words} is required: give it on the command line or in the YAML file")
        return self.kind(**values)

    def read_config(self, path: Path) -> dict[str, Any]:
        """The options in a YAML file, checked against their types; `5e-4` counts as a number.

        Raises:
            InputError: the file is missing or no YAML mapping, a key unknown or given twice, a value of another type.
        """
        hints = self.hints
        values: dict[str, Any] = {}
        for key, value in _read_mapping(path).items():
            name = str(key).replace("-", "_")
            name = self.aliases.get(name, name)
            if name not in hints:
                raise InputError(f"--config {path}: unknown option {key}{self._closest(name)}")
            if name in values:
                raise InputError(f"--config {path}: {name} is given twice, in two spellings")
            values[name] = _typed(f"--config {path}: {name}", value, hints[name])
        return values

    def parser(self) -> argparse.ArgumentParser:
        """The parser of the command line, which shows `--help`."""
        words = "".join(f"[{name.upper()}] " for name in self.positional)
        examples = ["examples:", *(f"  {example}" for example in self.examples)] if self.examples else []
        parser = _Parser(
            prog=self.prog,
            usage=f"%(prog)s {words}[--config FILE] [--option value ...]",
            description=self.description,
            epilog="\n".join(examples),
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        notes = {name: f"Also --{alias}." for alias, name in self.aliases.items()}
        for kind in self.groups:
            add_options(parser, kind, self.hints, notes)
        parser.add_argument("--config", help="YAML file of options; the command line wins over it.")
        if self.json:
            parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=JSON_HELP)
        return parser

    def _canonical(self, argument: str) -> str:
        """An option with underscores and under its own name; other words stay."""
        if not argument.startswith("--"):
            return argument
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        return "--" + self.aliases.get(name, name) + equals + value

    def _take_positional(self, namespace: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> None:
        given = {word.partition("=")[0] for word in argv}
        free = [name for name in self.positional if f"--{name}" not in given]
        if len(rest) > len(free) or any(word.startswith("-") for word in rest):
            raise InputError(self._unknown_argument(rest))
        for name, word in zip(free, rest):
            setattr(namespace, name, word)

    def _unknown_argument(self, rest: Sequence[str]) -> str:
        first = next((argument for argument in rest if argument.startswith("-")), rest[-1])
        if not first.startswith("-"):
            return f"{first!r} belongs to no option; run with --help for the list"
        name = first.lstrip("-").partition("=")[0]
        return f"unknown option {first.partition('=')[0]}{self._closest(name, '--')}"

    def _closest(self, name: str, dashes: str = "") -> str:
        matches = difflib.get_close_matches(name, [*self.hints, *self.aliases], n=1)
        return f"; did you mean {dashes}{matches[0]}?" if matches else "; run with --help for the list"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets a later key replace an earlier one without a word; a settings file should not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            raise yaml.constructor.ConstructorError(
                problem=f"{repeated[0]} is given twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


def _read_mapping(path: Path) -> dict[Any, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror or error}") from None
    except RecursionError:
        raise InputError(f"--config {path}: nested too deeply for lines of `option: value`") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: expected lines of `option: value`, found a {type(content).__name__}")
    return content


def _config_parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def _without_none_word(name: str, value: Any, hint: Any) -> Any:
    words = value if isinstance(value, list) else [value]
    if not plain_type(hint)[2] or not any(word in NONE_WORDS for word in words):
        return value
    if len(words) > 1:
        raise InputError(f"--{name}: none cannot stand beside other values")
    return None


def _typed(where: str, value: Any, hint: Any) -> Any:
    """`value` from YAML as the type `hint` asks for: bool, int, float, str, a list of one of these, or None."""
    kind, several, optional = plain_type(hint)
    if optional and value is None:
        return None
    if several:
        if not isinstance(value, list):
            raise InputError(f"{where}: expected a list, each entry {_KINDS[kind]}, got {value!r}")
        return [_typed(where, entry, kind) for entry in value]
    if kind is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:  # YAML 1.1 reads 5e-4 as text
            return float(value)
        except ValueError:
            pass
    if type(value) is kind:
        return value
    raise InputError(f"{where}: expected {_KINDS[kind]}, got {value!r}")
