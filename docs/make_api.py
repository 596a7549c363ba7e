# SPDX-License-Identifier: Apache-2.0
"""Write docs/api.md from the docstrings of the public names and from the commands.

python docs/make_api.py
"""

import ast
import inspect
import re
import sys
import textwrap
from importlib import import_module
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hf_simprune  # noqa: E402
from hf_simprune.cli import EXIT_CODES  # noqa: E402
from hf_simprune.commands import COMMANDS  # noqa: E402


PAGE = ROOT / "docs" / "api.md"
PARTS = {
    "Train": ("DinoArguments", "DinoTrainer", "build_reducer"),
    "Compress": ("compress", "analyze", "plan", "convert", "CompressionPlan", "Span", "Half", "RedundancyReport"),
    "Measure": ("evaluate_knn", "evaluate_linear"),
    "Publish": ("publish",),
    "Models": tuple(name for name in hf_simprune.__all__ if name.startswith("SimPrune")),
    "Errors": ("InputError",),
}
# What functions above return.
RESULTS = {
    "compress": ("hf_simprune.rba.compression", "Compressed"),
    "analyze": ("hf_simprune.rba.analysis", "Analysis"),
    "plan": ("hf_simprune.rba.choice", "Choice"),
    "evaluate_linear": ("hf_simprune.evaluation.frozen", "FrozenResult"),
    "publish": ("hf_simprune.hub.publish", "Published"),
}
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises):")
_ENTRY = re.compile(r"(\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*): +(.+)")
_WIDTH = 110


def page() -> str:
    """The whole of docs/api.md."""
    parts = [
        "# Python and command line\n\nWritten by `python docs/make_api.py` from docstrings; change those. All names "
        "below are those of `hf_simprune`, loaded when they are first used: `import hf_simprune` imports neither "
        "torch nor transformers."
    ]
    for title, names in PARTS.items():
        parts.append(f"## {title}")
        for name in names:
            parts.append(entry(name, getattr(hf_simprune, name)))
            if name in RESULTS:
                module, result = RESULTS[name]
                parts.append(entry(result, getattr(import_module(module), result), f"{module}.{result}"))
    return "\n\n".join([*parts, command_line()]) + "\n"


def entry(name: str, thing: object, title: str | None = None) -> str:
    """One class or function: heading, signature, docstring; of a class the public methods that it defines itself."""
    node = definition(thing)
    text = [f"### {title or name}", markdown(inspect.getdoc(thing) or "")]
    if isinstance(node, ast.FunctionDef):
        text.insert(1, f"```text\n{signature(node)}\n```")
        return "\n\n".join(text)
    initial = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    fields = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign) and not ast.unparse(n).startswith("_")]
    if initial is not None:
        text.insert(1, f"```text\n{signature(initial, node.name)}\n```")
    elif fields and "dataclass" in " ".join(map(ast.unparse, node.decorator_list)):
        text.insert(1, "```text\nclass {}:\n{}\n```".format(node.name, textwrap.indent("\n".join(fields), "    ")))
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            kinds = {ast.unparse(decorator) for decorator in method.decorator_list}
            if not kinds <= {"property", "classmethod", "staticmethod", "cached_property"}:
                continue
            words = f"`{node.name}.{method.name}`" if "property" in kinds else f"`{signature(method, inline=True)}`"
            text.append(f"**{words}** {markdown(ast.get_docstring(method) or '')}".rstrip())
    return "\n\n".join(text)


def definition(thing: object) -> ast.ClassDef | ast.FunctionDef:
    """The syntax tree of a class or function."""
    node = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]  # type: ignore[arg-type]
    assert isinstance(node, (ast.ClassDef, ast.FunctionDef))
    return node


def signature(node: ast.FunctionDef, name: str | None = None, inline: bool = False) -> str:
    """`name(arguments) -> result`, one argument a line where one line would be too long."""
    given = node.args
    result = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    words = [argument(*pair) for pair in zip(positional, defaults, strict=True)]
    words += [f"*{given.vararg.arg}"] if given.vararg else ["*"] if given.kwonlyargs else []
    words += [argument(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    words += [f"**{given.kwarg.arg}"] if given.kwarg else []
    words = [word for word in words if word not in ("self", "cls")]
    line = f"{name or node.name}({', '.join(words)}){result}"
    if inline or len(line) <= _WIDTH:
        return line
    return f"{name or node.name}(\n" + "".join(f"    {word},\n" for word in words) + f"){result}"


def argument(node: ast.arg, default: ast.expr | None) -> str:
    """`name: type = default`."""
    text = node.arg if node.annotation is None else f"{node.arg}: {ast.unparse(node.annotation)}"
    if default is None:
        return text
    return f"{text} = {ast.unparse(default)}" if node.annotation is not None else f"{text}={ast.unparse(default)}"


def markdown(docstring: str) -> str:
    """Paragraphs as they are; of Args, Attributes and Raises a list; without pointers that only Python reads."""
    blocks, section = [], ""
    for block in re.split(r"\n\s*\n", docstring.strip()):
        lines = block.split("\n")
        found = _SECTION.fullmatch(lines[0].strip())
        if found:
            section = found[1]
            lines = textwrap.dedent("\n".join(lines[1:])).split("\n")
            body = " ".join(lines) if section == "Returns" else "\n".join(listed(lines))
            blocks.append(f"**{section}**\n\n{body}")
        else:
            blocks.append("\n".join(lines))
    return re.sub(r"\[(`[^`\]]+`)\](?!\()", r"\1", "\n\n".join(blocks))


def listed(lines: list[str]) -> list[str]:
    """`name: text` with its continuation lines as one item each."""
    items: list[str] = []
    for line in lines:
        found = None if line.startswith(" ") else _ENTRY.fullmatch(line.strip())
        if found:
            names = ", ".join(f"`{name}`" for name in found[1].split(", "))
            items.append(f"- {names}: {found[2]}")
        elif items:
            items[-1] += f" {line.strip()}"
        else:
            items.append(line.strip())
    return items


def command_line() -> str:
    """The commands and what they exit with."""
    parts = [
        "## Command line",
        "`hf-simprune COMMAND --help` lists a command's options; names are written with hyphens or underscores, and "
        "`--config file.yaml` reads them from a file. With `--json` a command prints one JSON object on standard "
        "output and nothing else; all other lines go to standard error. Tables are coloured on a terminal only; "
        "`NO_COLOR` turns that off. Several processes: `accelerate launch recipes/train_dino.py` and "
        "`recipes/compress.py` take the options of `train` and `compress`.",
    ]
    for name, command in COMMANDS.items():
        options = import_module(f"hf_simprune.commands.{name}").OPTIONS
        examples = "\n".join(options.examples)
        parts.append(f"### hf-simprune {name}\n\n{command.summary[0].upper()}{command.summary[1:]}.")
        parts.append(f"{options.description}\n\n```text\n{examples}\n```")
    rows = "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
    return "\n\n".join([*parts, "### Exit status", f"| | |\n|---|---|\n{rows}"])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
