"""Equality with the stock networks on the real DeiT-Tiny and real images."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from .conftest import DEIT, VIT


def real_images(shared_data: Path, count: int) -> Tensor:
    """(count, 3, 224, 224): centre crops with the checkpoint's own normalisation."""
    processor = json.loads((shared_data / "deit_tiny_patch16_224" / "preprocessor_config.json").read_text())
    column = pq.read_table(shared_data / "imagenet_sample500_240.parquet", columns=["image"])["image"]
    mean, std = (torch.tensor(processor[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    batch = []
    for cell in column.slice(0, count).to_pylist():
        image = Image.open(BytesIO(cell["bytes"] if isinstance(cell, dict) else cell)).convert("RGB")
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + 224, top + 224))))
        batch.append((pixels.permute(2, 0, 1) / 255 - mean) / std)
    return torch.stack(batch)


def test_real_weights_give_the_stock_logits_on_250_images(shared_data: Path):
    folder = shared_data / "deit_tiny_patch16_224"
    stock = ViTForImageClassification.from_pretrained(folder)
    own = VIT.classifier.from_pretrained(folder)
    worst, spread = 0.0, 0.0
    with torch.inference_mode():
        for batch in real_images(shared_data, 250).split(25):
            expected = stock(batch).logits
            worst = max(worst, (own(batch).logits - expected).abs().max().item())
            spread = max(spread, expected.std(dim=0).max().item())
    print(f"max |logit difference| over 250 images: {worst:.1e}")
    assert worst <= 1e-5
    assert spread > 0.5  # the images are told apart, so equality is not that of constants


def test_real_weights_with_a_distillation_token_give_the_stock_deit_features(shared_data: Path, tmp_path):
    source = ViTModel.from_pretrained(shared_data / "deit_tiny_patch16_224", add_pooling_layer=False)
    settings = {key: getattr(source.config, key) for key in ViTConfig.__annotations__}
    stock = DEIT.stock_model(DEIT.stock_config(**settings), add_pooling_layer=False)
    weights = source.state_dict()
    positions = weights["embeddings.position_embeddings"]
    torch.manual_seed(0)
    weights["embeddings.distillation_token"] = 0.5 * torch.randn(1, 1, positions.shape[-1])
    weights["embeddings.position_embeddings"] = torch.cat([positions[:, :1], positions[:, :1], positions[:, 1:]], 1)
    stock.load_state_dict(weights)
    stock.eval().save_pretrained(tmp_path)
    own, info = DEIT.model.from_pretrained(tmp_path, add_pooling_layer=False, output_loading_info=True)
    assert not any(info.values()) and own.embeddings.distillation_token.abs().min() > 0
    with torch.inference_mode():
        batch = real_images(shared_data, 25)
        difference = own(batch).last_hidden_state - stock(batch).last_hidden_state
    assert difference.abs().max().item() <= 1e-5
