"""The code blocks of a Markdown document, and what may stand in their info strings.

```bash                      run by bash, with our commands answered as in `newcomer.py`
```python                    run in a fresh namespace
```yaml file=run.yaml        written to that file, for a later block; so are json and, into the package, python
```diff file=…               applied to that file of the package; hunks are divided by @@
```text                      output, which holds no command
```mermaid                   a diagram
```bash no-run: the reason   left alone
"""

import re
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[2]
EXECUTED = ("bash", "python", "yaml", "json", "diff")
SHOWN = ("text", "mermaid", "bibtex")
PACKAGE = "hf_simprune/"
_FENCE = re.compile(r"^( {0,3}|> )(```+|~~~+)\s*(.*)$")
_COMMAND = re.compile(r"^(\$ )?(hf-simprune|hf|python|pip|make|accelerate|torchrun|import|from) \S", re.MULTILINE)
_DIAGRAM = re.compile(r"(flowchart|graph|sequenceDiagram|stateDiagram)")


@dataclass(frozen=True)
class Block:
    """`line` is that of the fence, counted from 1; `info` is what stands behind the language."""

    document: str
    line: int
    language: str
    info: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file that it is written to, or that it changes."""
        return self.info.removeprefix("file=") if self.info.startswith("file=") else None

    @property
    def reason(self) -> str | None:
        """Why it is not run; None where it is."""
        return self.info.removeprefix("no-run").lstrip(": ") if self.info.startswith("no-run") else None

    @property
    def changes_package(self) -> bool:
        return (self.file or "").startswith(PACKAGE)


def documents() -> list[Path]:
    """All documents for users, the README first, as its outputs are taken for granted later."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def runs_elsewhere(document: str) -> bool:
    """The snippets of this page share their names and have tests of their own, `tests/works_with/`."""
    return document == "docs/works_with.md"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks_of(text: str, document: str = "text.md") -> list[Block]:
    """All fenced blocks.

    Raises:
        AssertionError: a fence that is not closed, or code that is set in by four spaces and has no fence.
    """
    found, lines, number = [], text.splitlines(), 0
    while number < len(lines):
        line = lines[number]
        opening = _FENCE.match(line)
        if opening is None:
            before = lines[number - 1] if number else ""
            assert before.strip() or not re.match(r"    \S", line), f"{document}:{number + 1}: a block without a fence"
            number += 1
            continue
        indent, fence, words = opening.groups()
        closing = next(
            (n for n in range(number + 1, len(lines)) if lines[n].removeprefix(indent).rstrip() == fence), None
        )
        assert closing is not None, f"{document}:{number + 1}: the fence is not closed"
        language, _, info = words.strip().partition(" ")
        content = "".join(f"{inside.removeprefix(indent)}\n" for inside in lines[number + 1 : closing])
        found.append(Block(document, number + 1, language, info.strip(), content))
        number = closing + 1
    return found


def complaint(block: Block) -> str | None:
    """What keeps a block from being run, shown or left alone; None where all is well."""
    if block.language not in (*EXECUTED, *SHOWN):
        return f"nothing runs {block.language or 'a fence without a language'}: use one of {', '.join(EXECUTED)}"
    if block.language in SHOWN:
        if block.info:
            return f"{block.language} takes no {block.info}"
        if block.language == "text" and (command := _COMMAND.search(block.text)):
            return f"output holds a command, {command[0]}…: make it a block that is run"
        if block.language == "mermaid" and not _DIAGRAM.match(block.text):
            return "no kind of diagram"
        return None
    if block.reason is not None:
        return None if len(block.reason) > 20 else "no-run needs a reason"
    if block.info and block.file is None:
        return f"{block.info} is neither file=… nor no-run: …"
    if block.language in ("yaml", "json", "diff") and block.file is None:
        return f"{block.language} needs file=…, and a block that uses it"
    if block.language == "diff" and not block.changes_package:
        return f"a diff changes a file of {PACKAGE}"
    return None


def apply_diff(before: str, diff: str) -> str:
    """`before` with every hunk of `diff` applied, wherever its lines stand, which must be one place only.

    Raises:
        AssertionError: the lines that a hunk starts from are not there, or several times.
    """
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert before.count(old) == 1, f"found {before.count(old)} times:\n{old}"
        before = before.replace(old, new)
    return before
