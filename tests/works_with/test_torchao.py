"""int8 weights (torchao) of compressed models, loaded, saved and loaded again."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from .conftest import Page


pytest.importorskip("torchao", reason="`make test-docs` installs torchao")


@torch.no_grad()
def test_weights_are_int8_and_the_network_is_the_one_with_rounded_weights(page: Page, kind: str, others: torch.Tensor):
    quantized = page.run("torchao")["quantized"].eval()
    rounded = type(page.model).from_pretrained("outputs/smaller").eval()
    linear = {name: module for name, module in rounded.named_modules() if isinstance(module, nn.Linear)}
    assert any("map.dense" in name for name in linear) == (kind != "stock")
    for name, module in linear.items():
        found = quantized.get_submodule(name).weight
        assert type(found).__name__ == "Int8Tensor", name
        step = module.weight.abs().amax(1, keepdim=True) / 127  # rows have a scale each
        error = (found.dequantize() - module.weight).abs()
        assert (error <= step).all() and error.any(), name
        module.weight.copy_(found.dequantize())

    logits = quantized(others).logits
    torch.testing.assert_close(logits, rounded(others).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits, page.logits(others), atol=1e-3)
    sizes = [Path(folder, "model.safetensors").stat().st_size for folder in ("outputs/int8", "outputs/smaller")]
    assert sizes[0] < sizes[1]
    again = AutoModelForImageClassification.from_pretrained("outputs/int8").eval()
    assert type(again) is type(page.model)
    torch.testing.assert_close(again(others).logits, logits)
