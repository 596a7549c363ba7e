"""A broken card is found out, whatever is broken, and what is wrong is named."""

import json

import pytest
import yaml
from huggingface_hub import ModelCardData

import hf_simprune
from hf_simprune.hub.card_check import check_card, missing_parts
from hf_simprune.hub.compression_card import render_compression_card
from hf_simprune.hub.hub_names import hub_names
from hf_simprune.hub.model_card import render_model_card

from .test_compression_card import FULL as COMPRESSED
from .test_model_card import FULL as TRAINED


GOOD = render_compression_card(COMPRESSED)


def changed(old, new, text=GOOD):
    assert text.count(old) >= 1, old
    return text.replace(old, new, 1)


def with_metadata(**changes):
    """The card with other metadata; None takes a key away."""
    _, block, body = GOOD.split("---\n", 2)
    data = {**yaml.safe_load(block), **{key.replace("__", "-"): value for key, value in changes.items()}}
    return f"---\n{yaml.safe_dump({k: v for k, v in data.items() if v is not None}, sort_keys=False)}---\n{body}"


def with_result(**changes):
    _, block, _ = GOOD.split("---\n", 2)
    index = yaml.safe_load(block)["model-index"]
    result = index[0]["results"][0]
    for path, value in changes.items():
        place, _, key = path.partition("__")
        target = result["metrics"][0] if place == "metric" else result[place]
        target[key] = value
        if value is None:
            del target[key]
    return with_metadata(model__index=index)


def test_both_kinds_of_card_are_sound():
    assert check_card(GOOD) == [] and check_card(render_model_card(TRAINED)) == []
    assert check_card(with_metadata()) == []  # the helper itself breaks nothing
    assert check_card(with_result()) == []


METADATA = {
    "no metadata": ("# A title\n", "there is no metadata"),
    "no YAML": (changed("license: apache-2.0", "license: [apache"), "no YAML"),
    "a list": ("---\n- a\n- b\n---\n# A title\n", "no mapping"),
    "a key twice": (changed("license: apache-2.0\n", "license: apache-2.0\nlicense: mit\n"), "license is given twice"),
    "an unknown licence": (with_metadata(license="apache"), "license 'apache' is unknown"),
    "no licence": (with_metadata(license=None), "license is missing"),
    "other without a name": (with_metadata(license="other"), "needs a license_name"),
    "an unknown task": (with_metadata(pipeline_tag="image-recognition"), "pipeline_tag 'image-recognition'"),
    "no task": (with_metadata(pipeline_tag=None), "pipeline_tag is missing"),
    "another library": (with_metadata(library_name="transformer"), "library_name 'transformer'"),
    "an unknown relation": (with_metadata(base_model_relation="pruned"), "base_model_relation 'pruned'"),
    "no relation": (with_metadata(base_model_relation=None), "go together"),
    "a relation to nothing": (with_metadata(base_model=None), "go together"),
    "a folder as base": (with_metadata(base_model="/data/models/vit"), "base_model '/data/models/vit'"),
    "a folder as data": (with_metadata(datasets=["/data/images"]), "datasets '/data/images'"),
    "no tags": (with_metadata(tags=[]), "tags must be"),
    "an empty tag": (with_metadata(tags=["vision", " "]), "tags must be"),
    "a broken model-index": (with_metadata(model__index=[{"name": "x"}]), "cannot be read back"),
    "an empty model-index": (with_metadata(model__index=[{"name": "x", "results": []}]), "holds no result"),
    "a lone model name": (with_metadata(model_name="x"), "changes when the card is read"),
}
RESULTS = {
    "a value in words": (with_result(metric__value="70.5 %"), "'70.5 %' is no number"),
    "not a number": (with_result(metric__value=float("nan")), "nan is no number"),
    "a percentage": (with_result(metric__value=70.5), "70.5 is no fraction"),
    "an unknown metric": (with_result(metric__type="goodness"), "metric 'goodness'"),
    "no sample count": (with_result(metric__args=None), "number of images"),
    "no samples": (with_result(metric__args={"num_samples": 0}), "number of images"),
    "no split": (with_result(dataset__split=None), "the split is missing"),
    "no data set": (with_result(dataset__type="my images"), "'my images' cannot name a data set"),
    "an unknown task": (with_result(task__type="guessing"), "task 'guessing'"),
}
TEXT = {
    "the Hub's placeholder": (GOOD + "\n[More Information Needed]\n", "'[More Information Needed]'"),
    "a placeholder": (GOOD + "\nTrained by <your name>.\n", "'<your name>'"),
    "something to do": (GOOD + "\nTODO: results\n", "'TODO'"),
    "an unrendered value": (changed("# small-vit", "# {{ card.name }}"), "left of a template"),
    "an unrendered value in code": (changed('from_pretrained("me', 'from_pretrained("{{ id }}'), "left of a template"),
    "an unrendered tag": (GOOD + "\n{%- if x %}\n", "left of a template"),
    "an access token": (GOOD + "\n`hf_" + "a1B2" * 8 + "`\n", "access token"),
    "an open code block": (GOOD.removesuffix("```\n"), "code block is not closed"),
    "no title": (changed("# small-vit\n", ""), "title is missing"),
    "a value that is none": (changed("| 0.2 |", "| None |"), "a cell without a value (None)"),
    "a value that is no number": (changed("| 0.15 |", "| nan % |"), "a cell without a value (nan %)"),
    "a short row": (changed("| 150 images |", "|"), "rows of different width"),
    "a table without a line": (changed("| --- | --- |\n", ""), "no line under its header"),
}  # fmt: skip


@pytest.mark.parametrize("card, words", [pytest.param(*case, id=name) for name, case in METADATA.items()])
def test_broken_metadata(card, words):
    assert any(words in fault for fault in check_card(card)), check_card(card)


@pytest.mark.parametrize("card, words", [pytest.param(*case, id=name) for name, case in RESULTS.items()])
def test_broken_results(card, words):
    assert [fault for fault in check_card(card) if words in fault], check_card(card)


@pytest.mark.parametrize("card, words", [pytest.param(*case, id=name) for name, case in TEXT.items()])
def test_broken_text(card, words):
    (fault,) = check_card(card)
    assert words in fault


def test_pictures_that_are_not_there_are_missed_only_where_the_folder_is_known(tmp_path):
    assert check_card(GOOD, tmp_path) == ["text: it links to redundancy.png, which is not in the folder"]
    (tmp_path / "redundancy.png").touch()
    assert check_card(GOOD, tmp_path) == []


def test_a_part_that_is_missing_is_named():
    assert missing_parts(GOOD) == []
    assert missing_parts(changed("## Limits", "## Remarks")) == ["limits"]
    assert missing_parts(changed("2410.04941},", "}")) == ["citation of RBA"]
    assert len(missing_parts("# A title\n")) == 5


def test_what_the_hub_client_writes_on_its_own_is_found_out():
    from huggingface_hub import ModelCard

    text = str(ModelCard.from_template(ModelCardData(license="mit"), model_id="x"))
    faults = check_card(text)
    assert any("More Information Needed" in fault for fault in faults) and len(faults) > 3


def test_the_lists_are_sorted_words_without_doubles():
    path = f"{hf_simprune.__path__[0]}/hub/hub_names.json"
    with open(path, encoding="utf-8") as file:
        lists = json.load(file)
    for kind, names in lists.items():
        assert names == sorted(set(names)) and tuple(names) == hub_names(kind)
    assert {"apache-2.0", "cc-by-nc-4.0", "other", "unknown"} <= set(hub_names("licenses"))
    assert {"image-classification", "image-feature-extraction"} <= set(hub_names("pipeline_tags"))
    assert set(hub_names("base_model_relations")) == {"adapter", "finetune", "merge", "quantized"}
