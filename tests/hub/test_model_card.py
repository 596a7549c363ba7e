# SPDX-License-Identifier: Apache-2.0
"""The card says what it was given, says nothing else, and its snippet runs."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import ViTConfig, ViTModel

import hf_simprune
from hf_simprune.evaluation.features import build_image_processor
from hf_simprune.hub.model_card import KNNRow, TrainingCard, render_model_card


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
)
FULL = replace(
    BARE,
    token_reduction="simprune",
    keep_rate=0.7,
    dataset_id="someone/digits",
    base_model="someone/vit",
    license="apache-2.0",
    run={"optimiser steps": 800, "images per second": 312.5},
    config={"keep_rate": 0.7, "reduction_layers": [1, 3, 4], "note": "a|b"},
    evaluated_on="360 test images",
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


def test_metadata_is_what_the_hub_reads():
    data = ModelCard(render_model_card(FULL)).data
    assert (data.library_name, data.license, data.base_model) == ("transformers", "apache-2.0", "someone/vit")
    assert data.datasets == "someone/digits"
    assert {"dino", "simprune", "vision"} <= set(data.tags)
    results = {result.metric_name: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "k-NN accuracy, trained network, CLS, all labels": 0.9456,
        "k-NN accuracy, trained network, CLS, 10 labels a class, 20 draws": 0.8,
    }
    assert {result.dataset_type for result in results.values()} == {"someone/digits"}


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
    assert data.eval_results is None and data.license is None and data.datasets is None and data.base_model is None


def test_a_keep_rate_without_a_say_is_not_mentioned():
    text = body(render_model_card(replace(FULL, token_reduction="tome", merges=True, keep_rate=None, config={})))
    assert "`tome` token reduction merged patches in both branches.\nThis is" in text
    assert "keep rate" not in text


def test_another_reduction_is_not_called_simprune():
    text = body(render_model_card(replace(FULL, token_reduction="random")))
    assert "`random` token reduction dropped patches in both branches (keep rate 0.7)." in text
    assert "SimPrune" not in text.split("## Citation")[0]


def test_access_tokens_never_reach_the_card():
    secret = "hf_abcDEF123456"
    config = {"token": "opaque", "dataset_name_or_path": secret, "seed": 1}
    text = render_model_card(replace(FULL, command=f"train --token {secret} --token=opaque --seed 1", config=config))
    assert secret not in text and "opaque" not in text
    assert "train --token *** --token=*** --seed 1" in text and "| `seed` | `1` |" in text


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


def test_the_reference_copy_is_the_packaged_template():
    packaged = Path(hf_simprune.__file__).parent / "hub" / "templates" / "dino_backbone.md"
    reference = Path(__file__).parents[2] / "model_cards" / "dino_backbone.md"
    assert reference.read_bytes() == packaged.read_bytes()


def test_the_snippet_runs_and_gives_the_class_token(tmp_path):
    folder = tmp_path / "model"
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4
    )
    model = ViTModel(config).eval()
    model.save_pretrained(folder)
    processor = build_image_processor(16, [0.5] * 3, [0.5] * 3)
    processor.save_pretrained(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")

    text = render_model_card(replace(BARE, model_id=str(folder)))
    snippet = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    assert len([line for line in snippet.splitlines() if line and "import" not in line]) <= 5
    script = snippet + "import torch\ntorch.save(features.detach(), 'features.pt')\n"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    with torch.no_grad():
        expected = model(**processor(images=image, return_tensors="pt")).last_hidden_state[:, 0]
    assert torch.equal(torch.load(tmp_path / "features.pt"), expected)
