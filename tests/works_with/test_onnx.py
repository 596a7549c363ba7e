"""A compressed network leaves torch: onnxruntime computes the same from the ONNX graph."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_simprune.rba.plan import CompressionPlan, Half

from ..rba.tiny_compression import IMAGE_SIZE, vit
from .conftest import Page, compress, reduced


onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime, onnx and onnxscript are in the extra `test`")
pytest.importorskip("onnxscript")


def run(pixels: Tensor, path: str | Path = "outputs/model.onnx") -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(found) for found in session.run(None, {"pixel_values": pixels.numpy()})]


def test_the_onnx_graph_gives_the_same_logits_for_another_batch(page: Page, others: Tensor):
    names = page.run("ONNX")
    expected = page.logits(page.pixels)
    torch.testing.assert_close(torch.from_numpy(names["logits"]), expected, rtol=1e-4, atol=1e-4)
    [found] = run(others)
    torch.testing.assert_close(found, page.logits(others), rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 1e-2


class Both(nn.Module):
    """Several networks, one export."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        return [model.base_model(pixel_values).last_hidden_state for model in self.models]


@torch.no_grad()
def test_the_other_methods_that_sort_go_through_and_break_ties_as_in_torch(tmp_path: Path):
    """Without keys all patches get the same attention, and the first ones stay."""
    torch.manual_seed(0)
    model = compress(CompressionPlan(1, (), (Half(0, "mlp", "const"),)), vit(1))
    for parameter in model.base_model.layers[0].attention.k_proj.parameters():
        parameter.zero_()
    networks = [
        reduced(model, token_reduction=method, keep_rate=0.6, reduction_layers=[0]) for method in ("evit", "mctf")
    ]
    both, pixels = Both(networks).eval(), torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    torch.onnx.export(both, (pixels,), tmp_path / "model.onnx", input_names=["pixel_values"], verbose=False)
    for found, expected in zip(run(pixels, tmp_path / "model.onnx"), both(pixels), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    kept = both(pixels)[0][:, :-1]  # but for the fused token
    assert kept.shape[1] == 1 + 10
    torch.testing.assert_close(kept, model.base_model(pixels).last_hidden_state[:, :11])
