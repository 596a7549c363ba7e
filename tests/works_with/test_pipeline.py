"""`pipeline` on compressed folders; in a process without this package: tests/recipes/test_compress.py."""

import numpy as np
import torch
from PIL import Image
from transformers import pipeline

from .conftest import LABELS, Page


def test_pictures_are_classified_as_the_model_does_it(page: Page):
    found = page.run("pipeline")["found"]
    assert type(page.names["classify"].model) is type(page.model)
    # By hand: what `build_image_processor` was told, a resize to 16 pixels a side, mean 0.5 and deviation 0.25.
    images = [
        Image.open(name).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR) for name in ("one.png", "two.png")
    ]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])
    expected = page.logits((pixels - 0.5) / 0.25).softmax(-1)
    for entries, scores in zip(found, expected, strict=True):
        best = scores.topk(2)
        assert [entry["label"] for entry in entries] == [LABELS[index] for index in best.indices]
        torch.testing.assert_close(torch.tensor([entry["score"] for entry in entries]), best.values, atol=1e-4, rtol=0)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


def test_features_come_from_the_pipeline_in_batches(page: Page):
    extract = pipeline("image-feature-extraction", model="outputs/smaller", device="cpu")
    found = torch.tensor(extract(["one.png", "two.png"], batch_size=2)).squeeze(1)
    with torch.no_grad():
        expected = page.model.base_model(page.pixels).last_hidden_state
    assert found.shape == (2, 17, 16)  # of a reduced model too, which restores its tokens
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
