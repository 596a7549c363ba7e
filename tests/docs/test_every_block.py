"""Every code block of the README and the guides is run, as whoever reads them would, in small."""

import os
import re
import shlex
import tempfile
from importlib import import_module
from pathlib import Path

import pytest

from hf_simprune.commands import COMMANDS

from .blocks import EXECUTED, ROOT, SHOWN, apply_diff, blocks_of, complaint, documents, name_of, runs_elsewhere
from .workplace import workplace


MOST_NOT_RUN = 3
GENERATED = "docs/api.md"  # from docstrings and the examples of `--help`, by docs/make_api.py


@pytest.fixture(scope="module")
def blocks():
    return [block for path in documents() for block in blocks_of(path.read_text(encoding="utf-8"), name_of(path))]


def test_every_block_is_run_or_shown_and_at_most_three_are_left_alone(blocks):
    written = [block for block in blocks if block.document != GENERATED]
    complaints = [f"{block.place}: {found}" for block in written if (found := complaint(block))]
    assert not complaints, "\n".join(complaints)
    left_alone = [block.place for block in blocks if block.reason is not None]
    assert len(left_alone) <= MOST_NOT_RUN, left_alone


def test_files_that_blocks_write_are_used_by_a_later_block_of_the_document(blocks):
    for number, block in enumerate(blocks):
        if block.file is not None and not block.changes_package:
            later = [other for other in blocks[number + 1 :] if other.document == block.document]
            assert any(block.file in other.text for other in later), block.place


def test_the_generated_page_holds_signatures_and_the_examples_of_the_commands_only(blocks):
    for block in blocks:
        if block.document == GENERATED:
            assert block.language == "text" and not block.info, block.place
    text = "".join(block.text for block in blocks if block.document == GENERATED)
    for name in COMMANDS:
        for example in import_module(f"hf_simprune.commands.{name}").OPTIONS.examples:
            assert f"{example}\n" in text
            text = text.replace(f"{example}\n", "")
    assert not re.search(r"^(hf-simprune|accelerate|python|eval|source)\b", text, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_are_options_that_it_takes(name):
    options = import_module(f"hf_simprune.commands.{name}").OPTIONS
    for example in options.examples:
        words = shlex.split(re.sub(r"eval \"\$\((.*)\)\"|source <\((.*)\)", r"\1\2", example), comments=True)
        words = words[: words.index(">")] if ">" in words else words
        if words[0] == "accelerate":
            words = [words[0], words[1], *words[3:]]  # without the recipe
        args = options.parse([word for word in words[2:] if word not in (name, "--json")])
        assert isinstance(args, options.kind)


def test_the_snippets_of_one_page_are_run_by_tests_of_their_own(blocks):
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "works_with").glob("*.py"))
    page = ROOT / "docs" / "works_with.md"
    sections = page.read_text(encoding="utf-8").split("\n## ")[1:]
    headings = [section.partition("\n")[0] for section in sections if "```" in section]
    assert headings and all(f'.run("{heading}")' in tests for heading in headings), headings
    assert {block.language for block in blocks if runs_elsewhere(block.document)} == {"python"}


@pytest.mark.documents
def test_every_block_does_what_it_says(blocks):
    # a socket's path is short, and those of pytest may not be
    with tempfile.TemporaryDirectory() as folder, workplace(Path(folder).resolve(), blocks) as place:
        here = [block for block in blocks if not runs_elsewhere(block.document)]
        failures = [failure for block in here if (failure := place.run(block))]
        slowest = sorted(place.seconds.items(), key=lambda entry: -entry[1])
        print(
            f"{sum(place.seconds.values()):.1f} CPU s",
            *(f"{seconds:.1f} s {name}" for name, seconds in slowest),
            sep="\n",
        )
        published = {name for name in place.hub.repos if name.startswith("me/")}
        asked = place.hub.requests
    assert not failures, "\n\n".join(failures)
    assert {"me/vit-digits", "me/deit-10", "me/vit-smaller"} <= published
    assert any("facebook/deit-tiny-patch16-224/resolve" in request for request in asked)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```sh\nls\n```", "nothing runs sh"),
        ("```\nhf-simprune info\n```", "nothing runs a fence without a language"),
        ("```text\nhf-simprune info outputs/x\n```", "output holds a command, hf-simprune i"),
        ("```text\nstart\nfrom x import y\n```", "output holds a command"),
        ("```bash no-run\nls\n```", "no-run needs a reason"),
        ("```bash sometimes\nls\n```", "sometimes is neither"),
        ("```yaml\nkeep_rate: 1\n```", "yaml needs file="),
        ("```diff file=README.md\n a\n```", "a diff changes a file of hf_simprune/"),
        ("```mermaid\nhello\n```", "no kind of diagram"),
    ],
)
def test_a_block_that_nobody_runs_is_found(text, message):
    (block,) = blocks_of(text)
    assert (complaint(block) or "").startswith(message)


def test_code_without_a_fence_and_open_fences_are_found():
    with pytest.raises(AssertionError, match="text.md:3: a block without a fence"):
        blocks_of("run\n\n    hf-simprune info\n")
    with pytest.raises(AssertionError, match="text.md:1: the fence is not closed"):
        blocks_of("```bash\nls\n")


def test_blocks_are_found_with_their_places():
    first, second = blocks_of(
        "a\n```python file=a.py\nx = 1\n```\n\n```bash no-run: it would take a whole day\nls\n```\n"
    )
    assert (first.line, first.language, first.file, first.text) == (2, "python", "a.py", "x = 1\n")
    assert (second.place, second.reason, complaint(second)) == ("text.md:6", "it would take a whole day", None)
    assert not set(EXECUTED) & set(SHOWN)


def test_a_diff_needs_the_lines_it_starts_from():
    assert apply_diff("a\nb\nc\nd\n", " b\n+x\n c\n@@\n-d\n+e\n") == "a\nb\nx\nc\ne\n"
    with pytest.raises(AssertionError, match="found 0 times"):
        apply_diff("a\nb\n", " a\n+x\n c\n")
    with pytest.raises(AssertionError, match="found 2 times"):
        apply_diff("a\na\n", " a\n+x\n")


def test_a_block_that_fails_is_noticed(tmp_path):
    """The commands of a block run under `bash -e`: the first that fails is the block's failure."""
    from .workplace import Workplace

    (tmp_path / "images").mkdir()
    place = Workplace(tmp_path, None, tmp_path / "nobody")
    for text in ("false\ntrue\n", "false | true\n", "hf-simprunee info x\n"):
        (block,) = blocks_of(f"```bash\n{text}```")
        assert "status" in (place.run(block) or "nothing"), text
    assert os.path.islink(tmp_path / "text" / "recipes")
