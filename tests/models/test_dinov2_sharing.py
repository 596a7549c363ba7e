"""A folder of DINOv2 with its code: with this package, and in a process that cannot import it."""

import pytest
import torch
from torch import Tensor

from .dinov2_family import DINOV2, Dinov2Family
from .test_inference_reduction import reduced
from .test_sharing import (  # noqa: F401
    run_alone,
    save_with_code,
    test_a_stock_model_needs_no_code,
    test_the_folder_loads_with_the_package_without_a_flag,
    test_the_folder_loads_without_the_package_to_the_same_bits,
    test_the_folder_serves_the_image_classification_pipeline,
)


@pytest.fixture
def family() -> Dinov2Family:
    return DINOV2


def test_the_folder_has_the_code_of_its_family(tmp_path):
    save_with_code(DINOV2.own(), tmp_path)
    parts = ("blocks", "configuration", "loading", "maps", "modeling", "reduction")
    code = {f"{part}_simprune_dinov2.py" for part in parts}
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors", *code}


def test_token_reduction_goes_along(tmp_path, images: Tensor):
    """And stock checkpoints load strictly there too."""
    model = reduced(DINOV2, "tome", restore_tokens=True)
    save_with_code(model, tmp_path / "model")
    DINOV2.stock().save_pretrained(tmp_path / "stock")
    torch.save((images, model(images).last_hidden_state), tmp_path / "expected.pt")
    printed = run_alone(
        f"""
import torch
from transformers import AutoModel
images, features = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModel.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
print(type(model).__name__, model.reducer.name, torch.allclose(model(images).last_hidden_state, features, atol=1e-5))
stock, info = type(model).from_pretrained({str(tmp_path / "stock")!r}, output_loading_info=True)
print(any(info.values()), stock.reducer)
""",
        tmp_path,
    )
    assert printed == ["SimPruneDinov2Model", "tome", "True", "False", "None"]
