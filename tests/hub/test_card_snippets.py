"""The code in the cards runs in a process without this package and gives what it says."""

import re
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from hf_simprune.evaluation.features import build_image_processor
from hf_simprune.hub.compression_card import render_compression_card
from hf_simprune.hub.model_card import render_model_card

from ..elsewhere import run
from .test_compression_card import BARE as COMPRESSED
from .test_model_card import BARE as TRAINED


def snippet(text):
    return re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]


def test_the_snippets_run_and_give_the_class_token_and_the_name_of_a_class(tmp_path):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4,
        id2label={0: "rose", 1: "tulip", 2: "daisy"}, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    processor = build_image_processor(16, [0.5] * 3, [0.5] * 3)
    models = {"backbone": ViTModel(config).eval(), "classifier": ViTForImageClassification(config).eval()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")

    backbone = snippet(render_model_card(replace(TRAINED, model_id="backbone")))
    classifier = snippet(render_compression_card(replace(COMPRESSED, model_id="classifier")))
    assert len([line for line in backbone.splitlines() if line and "import" not in line]) <= 5
    script = backbone + "import torch\ntorch.save(features.detach(), 'features.pt')\n" + classifier + "print(label)"
    found = run(["-c", script], tmp_path)
    pixels = processor(images=image, return_tensors="pt")
    with torch.no_grad():
        expected = models["classifier"](**pixels).logits.argmax(-1).item()
        features = models["backbone"](**pixels).last_hidden_state[:, 0]
    assert found.stdout.strip() == config.id2label[expected], found.stderr
    torch.testing.assert_close(torch.load(tmp_path / "features.pt"), features)
