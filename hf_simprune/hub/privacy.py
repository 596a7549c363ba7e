# SPDX-License-Identifier: Apache-2.0
"""What others must not read: access tokens, and where things lie on the user's machine. Imports no torch."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml


TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_AFTER_OPTION = re.compile(r"(--token[ =])\S+")
_OPTION = re.compile(r"(--?[A-Za-z][\w-]*=)(.*)", re.DOTALL)
_ABSOLUTE = re.compile(r"(file://)?(/|~[\w.-]*(/|$)|\$HOME\b|\$\{HOME\}|[A-Za-z]:[\\/]|\\\\)")
_ADDRESS = re.compile(r"(?!file:)[A-Za-z][\w+.-]*://")
# In the middle of a sentence: two parts at least, so that "/" and "/s" stay what they are.
_IN_TEXT = re.compile(
    r"(?<![^\s\"'`=(\[{,;:|])(?:file://)?(?:~[\w.-]*|\.\.)?/(?!/)[^\s\"'`()\[\]{},;:|/]+(?:/[^\s\"'`()\[\]{},;|/]*)+"
)
_HOME = re.compile(r"(?<![\w.-])(?:/(?:home|Users)/[\w.-]+|/root(?=/)|[A-Za-z]:\\+Users\\+[\w.-]+)")


def masked(text: str) -> str:
    """Without access tokens: those that look like one, and whatever follows `--token`."""
    return TOKEN.sub("***", _AFTER_OPTION.sub(r"\1***", text))


def short_word(word: str, root: Path | None = None) -> str:
    """An absolute path, one from a home folder, or one with `..` by its last part; anything else as it is.

    Args:
        word: a value, or one word of a command line, also `--option=value`.
        root: a folder below which an absolute path is named from there and not by its last part.
    """
    if found := _OPTION.fullmatch(word):
        return found[1] + short_word(found[2], root)
    parts = re.split(r"[\\/]+", word.rstrip("\\/"))
    if _ADDRESS.match(word) or not (_ABSOLUTE.match(word) or ".." in parts):
        return word
    if root is not None and Path(word).is_absolute() and Path(word).is_relative_to(root):
        return Path(word).relative_to(root).as_posix()
    return parts[-1] if parts[-1] not in ("", "..") else word


def short_command(command: str) -> str:
    """A command line for a shell whose words are as of [`short_word`]; the same text where none of them changes."""
    try:
        words = shlex.split(command)
    except ValueError:
        return _short_text(command)
    short = [short_word(word) for word in words]
    return command if short == words else " ".join(map(shlex.quote, short))


def short_values(content: Any) -> Any:
    """JSON or YAML content with every path in it as of [`short_word`], commands word by word."""
    if isinstance(content, dict):
        return {
            key: short_command(value) if key == "command" and isinstance(value, str) else short_values(value)
            for key, value in content.items()
        }
    if isinstance(content, (list, tuple)):
        return [short_values(value) for value in content]
    return _short_text(short_word(content)) if isinstance(content, str) else content


def short_record(name: str, text: str) -> str:
    """The text of a `.json` or `.yaml` file as others may read it; the same text where it names no paths."""
    try:
        content = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return _short_text(text)
    short = short_values(content)
    if repr(short) == repr(content):
        return text
    if name.endswith(".json"):
        return json.dumps(short, indent=2, ensure_ascii=False) + "\n"
    return yaml.safe_dump(short, sort_keys=False, allow_unicode=True)


def short_card(text: str) -> str:
    """A card whose commands are as of [`short_command`]: those of its blocks of bash that write to `--output`."""
    block = re.compile(r"(?<=^```bash\n)[^\n]+(?=\n```$)", re.MULTILINE)
    return block.sub(lambda found: short_command(found[0]) if "--output" in found[0] else found[0], text)


def home_in(text: str) -> str | None:
    """A home folder that `text` names by its whole path, None if it names none."""
    found = _HOME.search(text)
    if found:
        return found[0]
    home = str(Path.home())
    return home if len(Path(home).parts) > 2 and re.search(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", text) else None


def _short_text(text: str) -> str:
    return _IN_TEXT.sub(lambda found: short_word(found[0]), text)
