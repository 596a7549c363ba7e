# SPDX-License-Identifier: Apache-2.0
"""`hf-simprune completion`: what bash, zsh and fish need, written from the options of the commands."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import import_module

from ..errors import InputError
from ..options.dataclass_parser import plain_type
from ..options.fields import option
from ..options.parsing import Options
from . import COMMANDS


SHELLS = ("bash", "zsh", "fish")


@dataclass(kw_only=True)
class CompletionArguments:
    """For which shell."""

    _argument_group_name = "shell"

    shell: str | None = option(None, "The shell.", SHELLS)


OPTIONS = Options(
    kind=CompletionArguments,
    groups=(CompletionArguments,),
    description="Print a script that completes commands, options and values.",
    required=("shell",),
    positional=("shell",),
    prog="hf-simprune completion",
    examples=(
        'eval "$(hf-simprune completion bash)"                                  # in ~/.bashrc',
        "source <(hf-simprune completion zsh)                                   # in ~/.zshrc, after compinit",
        "hf-simprune completion fish > ~/.config/fish/completions/hf-simprune.fish",
    ),
    json=True,
)


@dataclass(frozen=True)
class Word:
    """One option: its name with dashes in front, what it does, its values where they are known, else None.

    `()` are the values of a switch, which takes none.
    """

    name: str
    text: str
    choices: tuple[str, ...] | None


def run(args: CompletionArguments) -> dict[str, str]:
    """Print the script; returns it."""
    if args.shell not in SHELLS:
        raise InputError(f"--shell {args.shell} is unknown: choose one of {', '.join(SHELLS)}")
    script = {"bash": bash, "zsh": zsh, "fish": fish}[str(args.shell)]()
    print(script)
    return {"shell": str(args.shell), "script": script}


def words(command: str) -> Iterator[Word]:
    """The options of a command."""
    options: Options = import_module(f".{command}", __package__).OPTIONS
    aliases = {name: alias for alias, name in options.aliases.items()}
    for kind in options.groups:
        for entry in fields(kind):
            plain, _, _ = plain_type(options.hints[entry.name])
            choices = entry.metadata.get("choices") or (("true", "false") if plain is bool else None)
            text = entry.metadata["help"]
            for name in filter(None, (entry.name, aliases.get(entry.name))):
                yield Word(f"--{name}", text, choices)
    yield Word("--config", "YAML file of options.", None)
    yield Word("--json", "Print one JSON object.", ())
    yield Word("--help", "Show the options.", ())


def bash() -> str:
    """A function for `complete`. Words without known values are completed as file names."""
    names, values = [], []
    for command in COMMANDS:
        found = list(words(command))
        names.append(f'            {command}) names="{" ".join(word.name for word in found)}" ;;')
        values += [
            f'        "{command} {word.name}") values="{" ".join(word.choices)}" ;;' for word in found if word.choices
        ]
    return "\n".join(
        [
            "_hf_simprune() {",
            '    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"',
            '    local command="${COMP_WORDS[1]}" names="" values=""',
            "    COMPREPLY=()",
            "    if [[ $COMP_CWORD -eq 1 ]]; then",
            f'        COMPREPLY=($(compgen -W "{" ".join(COMMANDS)} --help --version" -- "$current"))',
            "        return",
            "    fi",
            # options may be written with hyphens too
            '    [[ $previous == --* ]] && previous="${previous#--}" && previous="--${previous//-/_}"',
            '    case "$command $previous" in',
            *values,
            f'        "completion completion") values="{" ".join(SHELLS)}" ;;',
            "    esac",
            "    if [[ $current == -* ]]; then",
            '        current="${current##-}" && current="${current##-}" && current="--${current//-/_}"',
            '        case "$command" in',
            *names,
            "        esac",
            '        COMPREPLY=($(compgen -W "$names" -- "$current"))',
            "    elif [[ -n $values ]]; then",
            '        COMPREPLY=($(compgen -W "$values" -- "$current"))',
            "    fi",
            "}",
            "complete -o default -F _hf_simprune hf-simprune",
        ]
    )


def zsh() -> str:
    """A function for `compdef`."""
    commands, cases = [], []
    for name, command in COMMANDS.items():
        commands.append(f"        '{name}:{_quoted(command.summary)}'")
        cases.append(f"        {name}) _arguments \\")
        for word in words(name):
            text = _quoted(word.text).replace("[", r"\[").replace("]", r"\]").replace(":", r"\:")
            takes = ":value:_files"
            if word.choices is not None:
                takes = f":value:({' '.join(word.choices)})" if word.choices else ""
            cases.append(f"            '{word.name}[{text}]{takes}' \\")
        bare = f":shell:({' '.join(SHELLS)})" if name == "completion" else "*:file:_files"
        cases.append(f"            '{bare}' ;;")
    return "\n".join(
        [
            "#compdef hf-simprune",
            "_hf_simprune() {",
            "    local -a commands=(",
            *commands,
            "    )",
            "    if (( CURRENT == 2 )); then",
            "        _describe command commands",
            "        return",
            "    fi",
            '    local command="$words[2]"',
            "    shift words",
            "    (( CURRENT-- ))",
            '    case "$command" in',
            *cases,
            "    esac",
            "}",
            "compdef _hf_simprune hf-simprune",
        ]
    )


def fish() -> str:
    """One `complete` a word."""
    lines = ["complete -c hf-simprune -n __fish_use_subcommand -f"]
    for name, command in COMMANDS.items():
        lines.append(
            f"complete -c hf-simprune -n __fish_use_subcommand -f -a {name} -d '{_quoted(command.summary, fish=True)}'"
        )
        here = f"complete -c hf-simprune -n '__fish_seen_subcommand_from {name}'"
        for word in words(name):
            takes = " -r"
            if word.choices is not None:
                takes = f" -x -a '{' '.join(word.choices)}'" if word.choices else ""
            lines.append(f"{here} -l {word.name[2:]}{takes} -d '{_quoted(word.text, fish=True)}'")
    lines.append(f"complete -c hf-simprune -n '__fish_seen_subcommand_from completion' -f -a '{' '.join(SHELLS)}'")
    return "\n".join(lines)


def _quoted(text: str, fish: bool = False) -> str:
    """For single quotes, which a shell ends and begins again for a quote; fish takes a backslash."""
    return text.replace("'", r"\'" if fish else "'\\''")
