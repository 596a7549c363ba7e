"""LoRA (PEFT) on compressed models: what is trained, saved, loaded and merged."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_simprune.models.sharing import save_with_code

from .conftest import Page


pytest.importorskip("peft", reason="peft is in the extra `test`")


@torch.no_grad()
def test_an_adapter_is_trained_saved_loaded_and_merged(page: Page, kind: str, others: torch.Tensor):
    with torch.enable_grad():
        names = page.run("PEFT")
    before = type(page.model).from_pretrained("outputs/smaller").state_dict()
    saved = load_file("outputs/adapter/adapter_model.safetensors")
    adapted = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in saved if ".lora_" in key}
    assert any("map.dense" in name for name in adapted) == (kind != "stock")
    assert any(name.endswith("q_proj") for name in adapted)

    merged = names["merged"].eval()
    after = merged.state_dict()
    assert after.keys() == before.keys() and type(merged) is type(page.model)
    for name, value in before.items():
        stem = name.removesuffix(".weight")
        if name.startswith("classifier."):
            expected = saved[f"base_model.model.{name}"]
            assert not torch.equal(expected, value)
        elif stem in adapted:  # W + alpha / r * B A
            a, b = (saved[f"base_model.model.{stem}.lora_{part}.weight"] for part in "AB")
            expected = value + 8 / 4 * b @ a
            assert not torch.equal(expected, value)
        else:
            expected = value
        torch.testing.assert_close(after[name], expected, atol=1e-6, rtol=1e-5, msg=name)

    expected = merged(others).logits
    assert not torch.allclose(expected, page.logits(others), atol=1e-2)
    torch.testing.assert_close(names["again"].eval()(others).logits, expected, atol=1e-4, rtol=1e-4)
    if kind == "stock":
        merged.save_pretrained("outputs/merged")
    else:
        save_with_code(merged, "outputs/merged")
    loaded = AutoModelForImageClassification.from_pretrained("outputs/merged").eval()
    assert torch.equal(loaded(others).logits, expected)
    assert not Path("outputs/merged/adapter_config.json").exists()
