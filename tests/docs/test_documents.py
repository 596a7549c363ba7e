"""What documents say of options, commands, files and results is what there is."""

import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import hf_simprune
from hf_simprune.cli import EXIT_CODES
from hf_simprune.commands import COMMANDS
from hf_simprune.dino.arguments import DinoArguments
from hf_simprune.rba.arguments import CompressArguments
from hf_simprune.reduction.methods import METHODS, method_options

from .blocks import ROOT, documents, name_of


LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
# Options of programs that are not ours.
OTHERS = {"--help", "--shutdown-timeout", "--nproc-per-node", "--multi_gpu", "--num_processes", "--config_file"}
NUMBER = r"([+−-]?\d+(?:\.\d+)?)"
SPAN = re.compile(rf"{NUMBER} \[{NUMBER}, {NUMBER}\]")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Headings as GitHub and the Hub make them to anchors."""
    headings = re.findall(r"^#+ (.+)$", without_fences(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", documents(), ids=name_of)
def test_links_lead_somewhere(path):
    for target in LINK.findall(without_fences(path.read_text(encoding="utf-8"))):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_guide_is_reached_from_the_readme():
    links = set(LINK.findall(read("README.md")))
    assert {name_of(path) for path in documents()} - links == {"README.md"}


@pytest.mark.parametrize(
    ("guide", "options"), [("docs/training.md", DinoArguments), ("docs/compression.md", CompressArguments)]
)
def test_a_guide_explains_every_option(guide, options):
    names = {word.strip("-").replace("-", "_") for code in CODE.findall(read(guide)) for word in code.split()}
    missing = [entry.name for entry in fields(options) if not entry.name.startswith("_") and entry.name not in names]
    assert not missing


def test_options_in_the_text_exist():
    known = {f"--{entry.name}" for options in (DinoArguments, CompressArguments) for entry in fields(options)}
    for name in COMMANDS:
        options = import_module(f"hf_simprune.commands.{name}").OPTIONS
        known |= {f"--{option}" for option in (*options.hints, *options.aliases)}
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
    known |= {"--config", "--json", "--version"} | OTHERS | set(re.findall(r'add_argument\("(--\w+)"', scripts))
    known |= {f"--{name}" for name in re.findall(r"^    (\w+): .+ = \w+\(", scripts, re.MULTILINE)}
    for path in documents():
        for code in CODE.findall(without_fences(path.read_text(encoding="utf-8"))):
            for word in re.findall(r"(?<!\S)--[\w-]+", code):
                assert word in known or "--" + word[2:].replace("-", "_") in known, (path.name, code)


def test_methods_and_their_options_are_named():
    guide = read("docs/training.md")
    for name in METHODS:
        assert f"`{name}`" in guide
        (row,) = [line for line in guide.splitlines() if line.startswith("| `") and f"`{name}`" in line.split("|")[1]]
        options = [option for option in method_options(name) if not option.startswith("tau_")]
        assert "…" in row or all(f"`{option}`" in row for option in options), name


def test_commands_and_exit_statuses_are_those_of_the_program():
    tour = read("docs/quick_tour.md")
    assert set(re.findall(r"^\| `hf-simprune (\w+)` \|", tour, re.MULTILINE)) == set(COMMANDS)
    assert dict(re.findall(r"^\| (\d+) \| (.+) \|$", tour, re.MULTILINE)) == {
        str(status): meaning for status, meaning in EXIT_CODES.items()
    }


def test_results_in_the_readme_are_among_those_recorded():
    """Each number with its interval, rounded as the README does."""

    def triples(text: str) -> list[list[str]]:
        return [[part.replace("−", "-").lstrip("+") for part in found] for found in SPAN.findall(text)]

    recorded = [[float(part) for part in found] for found in triples(read("benchmarks/RESULTS.md"))]
    claimed = triples(read("README.md").partition("\n## Results\n")[2].partition("\n## ")[0])
    assert len(claimed) > 10
    for found in claimed:
        ranges = [(float(part), 0.5001 * 10.0 ** -len(part.partition(".")[2])) for part in found]
        near = [all(abs(v - x) <= half for v, (x, half) in zip(values, ranges)) for values in recorded]
        assert any(near), found


def test_the_citation_names_version_and_papers():
    content = yaml.safe_load(read("CITATION.cff"))
    assert content["cff-version"] == "1.2.0" and content["version"] == hf_simprune.__version__
    assert content["title"] and content["message"] and content["authors"] and content["license"] == "Apache-2.0"
    papers = re.findall(r"@\w+\{.*?\n\}", read("hf_simprune/hub/templates/papers.bib"), re.DOTALL)
    assert len(papers) == len(content["references"]) == 2
    for paper, reference in zip(papers, content["references"]):
        values = dict(re.findall(r"(\w+)\s*= \{(.+)\},?$", paper, re.MULTILINE))
        names = [author.partition(", ")[0] for author in values["author"].replace(r"{\`a}", "à").split(" and ")]
        assert reference["title"] == values["title"] and reference["url"] == values["url"]
        assert [author["family-names"] for author in reference["authors"]] == names
        assert str(reference["year"]) == values["year"]


def test_the_version_has_an_entry_among_the_changes():
    assert re.search(rf"^## {re.escape(hf_simprune.__version__)}\b", read("CHANGELOG.md"), re.MULTILINE)


def test_python_files_that_are_shipped_or_run_say_their_licence():
    for folder in ("hf_simprune", "recipes", "benchmarks", "docs", "model_cards"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n"), path


def test_pictures_are_small_enough_for_a_repository():
    for path in (ROOT / "docs" / "images").iterdir():
        assert path.suffix == ".png" and path.stat().st_size < 200_000, path
