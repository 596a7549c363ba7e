# SPDX-License-Identifier: Apache-2.0
"""Checks a model card without asking the Hub: its metadata, its Markdown, and that nothing was left to fill in."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .hub_names import hub_names, is_repo_id
from .privacy import TOKEN


_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_FENCE = re.compile(r"^```.*?^```[ \t]*$", re.DOTALL | re.MULTILINE)
_BIBTEX = re.compile(r"^```bibtex$.*?^```[ \t]*$", re.DOTALL | re.MULTILINE)
_PLACEHOLDERS = (
    r"\[more information needed\]",
    r"\[optional\]",
    r"\b(?:TODO|TBD|FIXME)\b",
    r"\blorem ipsum\b",
    r"<(?:your|insert|fill|add)\b[^>\n]*>",
    r"\byour[-_ ]?(?:user)?name/",
)
_TEMPLATE = re.compile(r"\{\{|\{%")
_NOTHING = re.compile(r"(?<!\\)\|[ `]*(?:None|nan|inf|-inf)[ `%]*(?=\|)")
_LINK = re.compile(r"(!?)\[[^\]\n]*\]\(([^)\s]+)\)")
# What a card of this package has; a card that its owner has edited need not.
_PARTS = {
    "how to load it": r"^## Use$",
    "limits": r"^## Limits$",
    "the command that made it": r"^```bash$",
    "citation of SimPrune": r"openreview\.net/forum\?id=GTcEe5fayC",
    "citation of RBA": r"journal = \{arXiv preprint arXiv:2410\.04941\}",
}


def check_card(text: str, folder: str | Path | None = None) -> list[str]:
    """What is wrong with a card, one line a fault; an empty list if nothing is.

    The metadata must be a mapping that `ModelCard(text).data` gives back unchanged, with a library, pipeline tag,
    licence and relation that the Hub knows, ids that can be ids, and results with data set, split and number of
    images. The text must have no placeholder, access token, unrendered template, broken table or open code block.

    Args:
        text: of README.md.
        folder: where it lies; files it shows or links to must be there.
    """
    found = _FRONT_MATTER.match(text.replace("\r\n", "\n"))
    if found is None:
        return ["there is no metadata: a card begins with YAML between two lines of ---"]
    text = text.replace("\r\n", "\n")
    return [*_metadata_faults(text, found[1]), *_text_faults(text[found.end() :]), *_link_faults(text, folder)]


def missing_parts(text: str) -> list[str]:
    """What a card of this package should have and `text` has not; every part in words."""
    return [words for words, pattern in _PARTS.items() if not re.search(pattern, text, re.MULTILINE)]


def _metadata_faults(text: str, block: str) -> list[str]:
    try:
        raw = yaml.safe_load(block)
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {_one_line(error)}"]
    if not isinstance(raw, dict):
        return ["the metadata is no mapping"]
    faults = [f"metadata: {key} is given twice" for key in _repeated_keys(block)]
    try:
        card = ModelCard(text)
        again = ModelCard(str(card))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return [*faults, f"the metadata cannot be read back: {_one_line(error)}"]
    if card.data.to_dict() != raw or again.data.to_dict() != raw:
        read = card.data.to_dict()
        changed = sorted(str(key) for key in raw.keys() | read.keys() if read.get(key) != raw.get(key))
        faults.append(f"metadata: {', '.join(changed) or 'it'} changes when the card is read and written")
    results = cast(ModelCardData, card.data).eval_results
    return [*faults, *_vocabulary_faults(raw), *_id_faults(raw), *_result_faults(raw, results)]


def _repeated_keys(block: str) -> list[str]:
    node = yaml.compose(block)
    assert isinstance(node, yaml.MappingNode)  # it was read as a mapping
    keys = [key.value for key, _ in node.value]
    return sorted({key for key in keys if keys.count(key) > 1})


def _vocabulary_faults(raw: dict[str, Any]) -> Iterator[str]:
    lists = {
        "library_name": ("libraries", True),
        "pipeline_tag": ("pipeline_tags", True),
        "license": ("licenses", True),
        "base_model_relation": ("base_model_relations", False),
    }
    for key, (kind, needed) in lists.items():
        value = raw.get(key)
        if value is None:
            if needed:
                yield f"metadata: {key} is missing"
        elif value not in hub_names(kind):
            yield f"metadata: {key} {value!r} is unknown to the Hub"
    if raw.get("license") == "other" and not raw.get("license_name"):
        yield "metadata: license other needs a license_name"
    if (raw.get("base_model") is None) != (raw.get("base_model_relation") is None):
        yield "metadata: base_model and base_model_relation go together, and one is missing"


def _id_faults(raw: dict[str, Any]) -> Iterator[str]:
    for key in ("base_model", "datasets"):
        for value in _listed(raw.get(key)):
            if not is_repo_id(value):
                yield f"metadata: {key} {value!r} cannot be a repository on the Hub"
    tags = raw.get("tags")
    if not isinstance(tags, list) or not tags or not all(isinstance(tag, str) and tag.strip() for tag in tags):
        yield "metadata: tags must be a list of words, one at least"


def _result_faults(raw: dict[str, Any], results: list[EvalResult] | None) -> Iterator[str]:
    if "model-index" in raw and not results:
        yield "metadata: model-index holds no result"
    for result in results or []:
        name = result.metric_name or result.metric_type
        value = result.metric_value
        if result.metric_type not in hub_names("metrics"):
            yield f"result {name}: metric {result.metric_type!r} is unknown"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            yield f"result {name}: {value!r} is no number"
        elif result.metric_type == "accuracy" and not 0 <= value <= 1:
            yield f"result {name}: {value} is no fraction"
        if result.task_type not in hub_names("pipeline_tags"):
            yield f"result {name}: task {result.task_type!r} is unknown"
        if not is_repo_id(result.dataset_type):
            yield f"result {name}: {result.dataset_type!r} cannot name a data set"
        if not result.dataset_split:
            yield f"result {name}: the split is missing"
        images = (result.metric_args or {}).get("num_samples")
        if isinstance(images, bool) or not isinstance(images, int) or images < 1:
            yield f"result {name}: the number of images (num_samples) is missing"


def _text_faults(body: str) -> Iterator[str]:
    for pattern in _PLACEHOLDERS:
        flags = 0 if "TODO" in pattern else re.IGNORECASE
        if found := re.search(pattern, body, flags):
            yield f"text: {found[0]!r} is still to be filled in"
    if found := _TEMPLATE.search(_BIBTEX.sub("", body)):
        yield f"text: {body[body.index(found[0]) :].splitlines()[0][:40]!r} is left of a template"
    if TOKEN.search(body):
        yield "text: it holds an access token"
    if len(re.findall(r"^```", body, re.MULTILINE)) % 2:
        yield "text: a code block is not closed"
    prose = _FENCE.sub("", body)
    if not re.search(r"^# \S", prose, re.MULTILINE):
        yield "text: the title is missing"
    if found := _NOTHING.search(prose):
        yield f"text: a table has a cell without a value ({found[0].strip('| `')})"
    yield from _table_faults(prose)


def _table_faults(prose: str) -> Iterator[str]:
    """Rows of another width than their header, and headers without a line of dashes."""
    for table in re.findall(r"(?:^\|.*\n?)+", prose, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in table.splitlines()]
        if len(rows) < 2 or not all(re.fullmatch(r" *:?-{3,}:? *", cell) for cell in rows[1]):
            yield f"text: the table {table.splitlines()[0]!r} has no line under its header"
        elif len({len(row) for row in rows}) > 1:
            yield f"text: the table {table.splitlines()[0]!r} has rows of different width"


def _link_faults(text: str, folder: str | Path | None) -> Iterator[str]:
    if folder is None:
        return
    for _, target in _LINK.findall(_FENCE.sub("", text)):
        if not re.match(r"[a-z]+:|#", target) and not (Path(folder) / target).is_file():
            yield f"text: it links to {target}, which is not in the folder"


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
