"""The card of a compressed network says what it was given, says nothing else, and its snippet runs."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

import hf_simprune
from hf_simprune.evaluation.features import build_image_processor
from hf_simprune.hub.compression_card import CompressionCard, render_compression_card


BARE = CompressionCard(
    name="small-vit",
    model_id="me/small-vit",
    model_class="ViTForImageClassification",
    auto_class="AutoModelForImageClassification",
    result="label",
    output="model.config.id2label[model(**inputs).logits.argmax(-1).item()]",
    stock=True,
    original="my-vit",
    depth=12,
    kept=10,
    chosen="chosen by its measured effect on the outputs",
    fitted="in closed form, untrained",
    replaced=[("block 5", "fold, into the MLP of block 4"), ("block 10", "fold, into the MLP of block 9")],
    dataset="flowers",
    calibration="300 images",
    evaluated_on="150 images held out from calibration",
    results=[("parameters, M", "5.7", "4.8", "-15.6 %"), ("KL of the logits, nats", "0", "0.2", "[0.1, 0.3]")],
    command="hf-simprune compress my-vit --dataset flowers --remove-blocks 2 --output small-vit",
    seed=42,
    hardware="a laptop",
    versions={"torch": "A", "transformers": "B"},
)
FULL = replace(
    BARE,
    stock=False,
    base_model="someone/vit",
    dataset_id="someone/flowers",
    license="apache-2.0",
    healed=[("KL of the logits, nats", "0", "0.15", "[0.1, 0.2]")],
    heal_steps=200,
    notes=["This network has little to give."],
    settings={"ridge": 1e-4, "token": "secret"},
    picture="redundancy.png",
)


def test_metadata_is_what_the_hub_reads():
    data = ModelCard(render_compression_card(FULL)).data
    assert (data.library_name, data.license, data.base_model) == ("transformers", "apache-2.0", "someone/vit")
    assert (data.datasets, data.pipeline_tag) == ("someone/flowers", "image-classification")
    backbone = ModelCard(render_compression_card(replace(FULL, auto_class="AutoModel"))).data
    assert backbone.pipeline_tag == "image-feature-extraction"


def test_the_text_holds_what_was_given():
    text = render_compression_card(FULL)
    assert "[someone/vit](https://huggingface.co/someone/vit) with 10 of its 12 blocks" in text
    assert "| block 5 | fold, into the MLP of block 4 |" in text
    assert "| parameters, M | 5.7 | 4.8 | -15.6 % |" in text
    assert "After 200 steps of label-free distillation" in text and "| 0.15 |" in text
    assert "> This network has little to give." in text
    assert "](redundancy.png)" in text and FULL.command in text and "torch A, transformers B" in text
    assert "trust_remote_code=True" in text and "stock class" not in text


def test_what_was_not_given_is_not_mentioned():
    text = render_compression_card(BARE)
    for word in ("distillation", "trust_remote_code", "None", "<details>", "redundancy.png)", "> "):
        assert word not in text.split("## Citation")[0], word
    assert text.split("# small-vit")[1].strip().startswith("my-vit with 10 of its 12 blocks, a `ViT")
    data = ModelCard(text).data
    assert data.license is None and data.datasets is None and data.base_model is None


def test_a_network_that_keeps_all_blocks_says_that_parts_went():
    assert "with 12 of its 12 blocks, some of them in part" in render_compression_card(replace(BARE, kept=12))


def test_access_tokens_never_reach_the_card():
    secret = "hf_abcDEF123456"
    text = render_compression_card(replace(FULL, command=f"hf-simprune compress m --token {secret}"))
    assert secret not in text and "secret" not in text and "--token ***" in text


def test_markdown_has_no_holes():
    for card in (BARE, FULL):
        text = render_compression_card(card)
        assert "{{" not in text and "{%" not in text and "\n\n\n" not in text
        assert text.endswith("```\n") and all(line == line.rstrip() for line in text.splitlines())


def test_the_reference_copy_is_the_packaged_template():
    packaged = Path(hf_simprune.__file__).parent / "hub" / "templates" / "compressed_model.md"
    reference = Path(__file__).parents[2] / "model_cards" / "compressed_model.md"
    assert reference.read_bytes() == packaged.read_bytes()


def test_the_snippet_runs_and_names_the_class(tmp_path):
    folder = tmp_path / "model"
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4,
        id2label={0: "rose", 1: "tulip", 2: "daisy"}, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    processor = build_image_processor(16, [0.5] * 3, [0.5] * 3)
    processor.save_pretrained(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")

    text = render_compression_card(replace(BARE, model_id=str(folder)))
    snippet = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    found = subprocess.run(
        [sys.executable, "-c", snippet + "print(label)"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    with torch.no_grad():
        expected = model(**processor(images=image, return_tensors="pt")).logits.argmax(-1).item()
    assert found.stdout.strip() == config.id2label[expected], found.stderr
