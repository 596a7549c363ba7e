"""Hits on held-out images, and what is kept of them."""

import _comparison_judge as judges
import numpy as np
import pytest
import torch

from hf_simprune.evaluation.features import build_image_processor, extract_features
from hf_simprune.models.architectures import build_backbone
from hf_simprune.models.stock import to_stock

from ..tiny_run import naive_knn, write_images


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a network and its processor, as a run leaves it."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    to_stock(build_backbone("vit_micro", 16, patch_size=8, **sizes)).save_pretrained(folder)
    build_image_processor(16, (0.5,) * 3, (0.5,) * 3).save_pretrained(folder)
    return folder


def judge(folder, train: int = 40, test: int = 12) -> judges.Judge:
    from pathlib import Path

    paths = [Path(write_images(folder / f"{name}.parquet", count)) for name, count in (("a", train), ("b", test))]
    return judges.Judge(*paths, folder / "judged", torch.device("cpu"))


def test_hits_are_those_of_the_features(trained, tmp_path):
    from transformers import AutoImageProcessor, AutoModel

    made = judge(tmp_path)
    hits = made.network("run", trained, trained)
    processor = AutoImageProcessor.from_pretrained(trained, backend="pil")
    network = AutoModel.from_pretrained(trained)
    bank, queries = (extract_features(network, images, processor, progress=False) for images in made.images)
    labels = made.labels[0].tolist()
    for kind in ("cls", "patch_mean"):
        found = naive_knn(bank[kind], labels, queries[kind], 20, 0.07)
        assert hits[f"knn_{kind}"].tolist() == [a == b for a, b in zip(found, made.labels[1].tolist())]
    assert hits["probe_cls"].shape == (12,) and set(judges.MEASURES) == set(hits)


def test_what_was_found_is_kept_until_the_images_change(trained, tmp_path, monkeypatch):
    first = judge(tmp_path).network("run", trained, trained)
    pixels = judge(tmp_path).pixels(trained)
    assert np.array_equal(pixels["knn_cls"], pixels["knn_patch_mean"])
    monkeypatch.setattr(judges, "extract_features", lambda *_, **__: pytest.fail("computed again"))
    kept = judge(tmp_path).network("run", trained, trained)
    assert all(np.array_equal(first[name], kept[name]) for name in judges.MEASURES)
    monkeypatch.undo()
    assert judge(tmp_path, test=16).network("run", trained, trained)["knn_cls"].shape == (16,)
