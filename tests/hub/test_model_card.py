# SPDX-License-Identifier: Apache-2.0
"""The card says what it was given, says nothing else, and its snippet runs."""

import re
from dataclasses import replace
from pathlib import Path

from huggingface_hub import ModelCard

import hf_simprune
from hf_simprune.hub.card_check import check_card, missing_parts
from hf_simprune.hub.eval_results import Evaluated
from hf_simprune.hub.facts import Licence
from hf_simprune.hub.model_card import KNNRow, TrainingCard, addressed_to, render_model_card


BARE = TrainingCard(
    name="vit-digits",
    model_id="me/vit-digits",
    model_class="ViTModel",
    architecture="ViT-micro",
    dataset="handwritten digits",
    command="accelerate launch recipes/train_dino.py --config digits.yaml",
    seed=42,
    hardware="a laptop",
    versions={"torch": "A", "transformers": "B"},
    limits=["It has no head."],
)
FULL = replace(
    BARE,
    token_reduction="simprune",
    keep_rate=0.7,
    dataset_id="someone/digits",
    base_model="someone/vit",
    licence=Licence("apache-2.0"),
    run={"optimiser steps": 800, "images per second": 312.5},
    config={"keep_rate": 0.7, "reduction_layers": [1, 3, 4], "note": "a|b"},
    evaluated_on="360 test images",
    evaluated=Evaluated(dataset="digits", split="test", dataset_id="someone/digits", revision="a" * 40),
    eval_images=360,
    limits=["It has no head.", "One run."],
    knn=[
        KNNRow(features="random network, CLS", all_labels=0.8, few_labels=0.512, few_labels_std=0.021),
        KNNRow(features="trained network, CLS", all_labels=0.9456, few_labels=0.8, trained=True),
        KNNRow(features="raw pixels", all_labels=0.9611),
        KNNRow(features="not measured"),
    ],
    few_labels_name="10 labels a class, 20 draws",
    gain=(0.288, 0.271, 0.306),
    loss_curve="loss_curve.png",
    pruned_tokens="pruned_tokens.png",
)


def body(text):
    return text.split("---\n", 2)[2]


def test_cards_are_sound_whatever_they_tell():
    for card in (BARE, FULL, replace(BARE, token_reduction="tome", merges=True), replace(FULL, objective="dinov2")):
        text = render_model_card(card)
        assert check_card(text) == [] and missing_parts(text) == []


def test_metadata_is_what_the_hub_reads():
    data = ModelCard(render_model_card(FULL)).data
    assert (data.library_name, data.license, data.base_model) == ("transformers", "apache-2.0", "someone/vit")
    assert data.datasets == ["someone/digits"] and data.base_model_relation == "finetune"
    assert {"dino", "simprune", "vision"} <= set(data.tags)
    results = {result.metric_name: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "k-NN accuracy, trained network, CLS, all labels, 360 images": 0.9456,
        "k-NN accuracy, trained network, CLS, 10 labels a class, 20 draws, 360 images": 0.8,
    }
    for result in results.values():
        assert (result.dataset_type, result.dataset_split) == ("someone/digits", "test")
        assert result.dataset_revision == "a" * 40 and result.metric_args == {"num_samples": 360}


def test_tables_hold_the_numbers_given():
    text = render_model_card(FULL)
    assert "| features | all labels | 10 labels a class, 20 draws |" in text
    assert "| random network, CLS | 80.0 % | 51.2 ± 2.1 % |" in text
    assert "| trained network, CLS | 94.6 % | 80.0 % |" in text
    assert "| raw pixels | 96.1 % | – |" in text
    assert "not measured" not in text
    assert "+28.8 points, 95 % interval +27.1 to +30.6" in text
    assert "| optimiser steps | 800 |" in text and "| images per second | 312.5 |" in text
    assert "| `reduction_layers` | `[1, 3, 4]` |" in text and r"| `note` | `a\|b` |" in text
    assert "![" in text and "](loss_curve.png)" in text and "](pruned_tokens.png)" in text
    assert "keep rate 0.7" in text and "torch A, transformers B" in text and BARE.command in text


def test_what_was_not_measured_is_not_mentioned():
    text = render_model_card(BARE)
    visible = re.sub(r"```bibtex.*?```", "", body(text), flags=re.DOTALL)
    for word in (
        "%",
        "## Results",
        "loss_curve",
        "keep rate",
        "dropped",
        "SimPrune]",
        "Training started",
        "None",
        "|",
    ):
        assert word not in visible, word
    # The seed and the model's and paper's names hold the only digits left.
    assert set(re.findall(r"\d+", visible)) <= {"42", "2104", "14294", "0"}
    data = ModelCard(text).data
    assert data.eval_results is None and data.datasets is None and data.base_model is None
    assert data.license == "unknown" and data.get("base_model_relation") is None and "model_name" not in data.to_dict()


def test_a_licence_without_an_identifier_keeps_its_name_and_link():
    named = Licence("other", "dinov3-license", "https://example.org/license")
    data = ModelCard(render_model_card(replace(FULL, licence=named))).data
    assert (data.license, data.license_name, data.license_link) == tuple(named)


def test_a_keep_rate_without_a_say_is_not_mentioned():
    text = body(render_model_card(replace(FULL, token_reduction="tome", merges=True, keep_rate=None, config={})))
    assert "`tome` token reduction merged patches in both branches.\nThis is" in text
    assert "keep rate" not in text


def test_another_reduction_is_not_called_simprune():
    text = body(render_model_card(replace(FULL, token_reduction="random")))
    assert "`random` token reduction dropped patches in both branches (keep rate 0.7)." in text
    assert "SimPrune" not in text.split("## Citation")[0]


def test_access_tokens_never_reach_the_card():
    secret = "hf_" + "a1B2" * 9
    config = {"token": "opaque", "dataset_name_or_path": secret, "seed": 1}
    text = render_model_card(replace(FULL, command=f"train --token {secret} --token=opaque --seed 1", config=config))
    assert secret not in text and "opaque" not in text
    assert "train --token *** --token=*** --seed 1" in text and "| `seed` | `1` |" in text
    assert "python -m hf_simprune.cli" in render_model_card(replace(FULL, command="python -m hf_simprune.cli"))


def test_markdown_has_no_holes():
    for card in (BARE, FULL):
        text = render_model_card(card)
        assert "{{" not in text and "{%" not in text
        assert "\n\n\n" not in text
        assert text.endswith("```\n")
        for line in text.splitlines():
            assert line == line.rstrip()


def test_a_column_nobody_measured_is_left_out():
    text = render_model_card(replace(FULL, knn=[KNNRow(features="raw pixels", all_labels=0.5)]))
    assert "| features | all labels |\n| --- | --- |\n| raw pixels | 50.0 % |" in text


def test_the_reference_copies_are_the_packaged_templates():
    packaged = Path(hf_simprune.__file__).parent / "hub" / "templates"
    reference = Path(__file__).parents[2] / "model_cards"
    for path in packaged.iterdir():
        assert (reference / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_published_card_loads_the_repository_and_nothing_else_changes():
    text = render_model_card(replace(FULL, model_id="outputs/vit"))

    def ours(name):
        return name == "outputs/vit"

    published = addressed_to(text, "me/vit-digits", ours)
    assert published == render_model_card(FULL) and addressed_to(published, "me/vit-digits", ours) == published
    assert "outputs/vit" in text and check_card(published) == []
    of_two = text.replace('AutoModel.from_pretrained("outputs/vit")', 'AutoModel.from_pretrained("some/vit")')
    for other in (of_two, text.replace("## Use\n", "## How\n"), ""):
        assert addressed_to(other, "me/vit-digits", ours) == other
    for path in ("/srv/vit", "../vit", "./vit", "a/b/vit"):
        assert addressed_to(text.replace("outputs/vit", path), "me/vit-digits", lambda name: False) == published
    assert addressed_to(text, "me/vit-digits", lambda name: False) == text
