"""A compressed network leaves torch: the ONNX graph computes the same."""

import pytest
import torch
from torch import Tensor, nn

from hf_simprune.rba.converter import convert
from hf_simprune.rba.maps import AffineMap, ConstMap
from hf_simprune.rba.plan import CompressionPlan, Half, Span

from .conftest import DEPTH, IMAGE_SIZE, WIDTH, make_model


onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime, onnx and onnxscript are in the extra `test`")
pytest.importorskip("onnxscript")


class Logits(nn.Module):
    """The network with nothing but a tensor coming out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values).logits


def affine() -> AffineMap:
    return AffineMap(torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH), 0.1 * torch.randn(WIDTH))


STOCK = CompressionPlan(DEPTH, (Span(2, 3, "fold"), Span(4, 5, "identity")))
OWN = CompressionPlan(DEPTH, (Span(2, 3, "linear"),), (Half(4, "attention", "const"), Half(5, "mlp", "linear")))


@pytest.mark.parametrize("plan", [STOCK, OWN], ids=["stock", "own"])
def test_the_onnx_graph_gives_the_same_logits(plan, tmp_path):
    torch.manual_seed(0)
    maps = {item: ConstMap(torch.randn(WIDTH)) if item.map == "const" else affine() for item in plan.items}
    maps = {item: fitted for item, fitted in maps.items() if item.map != "identity"}
    model = convert(make_model("vit-classifier"), plan, maps)
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        expected = model(images).logits
    torch.onnx.export(Logits(model).eval(), (images,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    [found] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 1e-2
