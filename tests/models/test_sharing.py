"""A folder with its code: with this package, and in a process that cannot import it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification, ViTImageProcessorPil, pipeline

from hf_simprune.errors import InputError
from hf_simprune.models.sharing import save_with_code

from ..elsewhere import run
from .conftest import Family
from .test_replaced_blocks import build


def run_alone(code: str, folder: Path, fresh: bool = False) -> list[str]:
    """What `code` prints, word by word, where importing this package is an error."""
    done = run(["-c", code], folder, fresh=fresh, PATH="")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_folder_loads_without_the_package_to_the_same_bits(family: Family, tmp_path, images: Tensor):
    model = build(family, kind="classifier", num_labels=5)
    save_with_code(model, tmp_path / "model")
    torch.save(images, tmp_path / "images.pt")
    torch.save((model(images).logits, model.base_model(images).last_hidden_state), tmp_path / "expected.pt")
    printed = run_alone(
        f"""
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
folder, images = {str(tmp_path / "model")!r}, torch.load({str(tmp_path / "images.pt")!r})
logits, features = torch.load({str(tmp_path / "expected.pt")!r})
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
classifier = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
backbone = AutoModel.from_pretrained(folder, trust_remote_code=True, add_pooling_layer=False)
hidden = backbone(images, output_hidden_states=True).hidden_states
print(type(config).__name__, type(classifier).__name__, type(backbone).__name__, len(hidden))
print(torch.equal(classifier(images).logits, logits), torch.equal(backbone(images).last_hidden_state, features))
classifier.save_pretrained("again")
again = AutoModelForImageClassification.from_pretrained("again", trust_remote_code=True, attn_implementation="eager")
print(torch.allclose(again(images).logits, logits, atol=1e-5), again.config._attn_implementation)
""",
        tmp_path,
        fresh=family.name == "vit",
    )
    names = [family.config.__name__, family.classifier.__name__, family.model.__name__]
    assert printed == [*names, "9", "True", "True", "True", "eager"]


def test_the_folder_loads_with_the_package_without_a_flag(family: Family, tmp_path, images: Tensor):
    model = build(family)
    save_with_code(model, tmp_path)
    again = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert type(again) is family.model
    assert torch.equal(again(images).last_hidden_state, model(images).last_hidden_state)
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is family.classifier


def test_the_folder_serves_the_image_classification_pipeline(family: Family, tmp_path):
    labels = {0: "cat", 1: "dog", 2: "owl"}
    model = build(family, kind="classifier", id2label=labels, label2id={name: key for key, name in labels.items()})
    save_with_code(model, tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    assert type(classify.model) is family.classifier
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    pixels = classify.image_processor(image, return_tensors="pt").pixel_values
    expected = dict(zip(labels.values(), model(pixels).logits[0].softmax(-1).tolist(), strict=True))
    assert {entry["label"]: entry["score"] for entry in classify(image)} == pytest.approx(expected, abs=1e-6)


def test_code_and_configuration_are_complete_and_the_model_is_left_as_it_was(family: Family, tmp_path):
    model = build(family, kind="classifier")
    before = model.config.to_dict()
    save_with_code(model, tmp_path)
    written = {"architectures": None, "dtype": None}  # as any save_pretrained does
    assert {**model.config.to_dict(), **written} == {**before, **written}
    assert not hasattr(model.config, "auto_map")
    name = family.name
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": f"configuration_simprune_{name}.{family.config.__name__}",
        "AutoModel": f"modeling_simprune_{name}.{family.model.__name__}",
        "AutoModelForImageClassification": f"modeling_simprune_{name}.{family.classifier.__name__}",
    }
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        ["config.json", "model.safetensors"]
        + [f"{part}_simprune_{name}.py" for part in ("blocks", "configuration", "maps", "modeling", "reduction")]
    )


def test_a_stock_model_needs_no_code(family: Family, tmp_path):
    with pytest.raises(InputError, match=f"got {family.stock_model.__name__}: a stock model needs no code"):
        save_with_code(family.stock(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_configuration_with_no_method_for_inference_is_refused_before_anything_is_written(family: Family, tmp_path):
    model = family.own()
    model.config.token_reduction = "random"
    with pytest.raises(InputError, match="token_reduction 'random' is not for inference: choose one of evit, expedit"):
        save_with_code(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
