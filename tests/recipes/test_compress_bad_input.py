"""Bad input to compress: one line that names the option, status 2, nothing written, before long work."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

from hf_simprune.cli import main
from hf_simprune.rba import run
from hf_simprune.rba.plan import CompressionPlan, Half, Span

from ..rba.tiny_compression import DEPTH, clip, save_checkpoint, vit
from ..tiny_run import png, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images.parquet", 30)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("vit") / "vit")


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs compress, expects it to refuse before the analysis is through, and returns its one error line."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(run, "convert", lambda *_: pytest.fail("the plan was carried out"))

    def refuse(model, data, *words):
        output = tmp_path / "folder" / "out"
        assert main(["compress", str(model), "--dataset", str(data), "--output", str(output), *words]) == 2
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in captured.err
        assert captured.out == ""  # the report comes first of all output
        assert not output.parent.exists()
        return errors[0]

    return refuse


def wide(folder, hidden_size, patch_size):
    config = ViTConfig(
        hidden_size=hidden_size, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, image_size=16,
        patch_size=patch_size, initializer_range=0.3,
    )  # fmt: skip
    return save_checkpoint(folder / "wide", ViTForImageClassification(config))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--remove-blocks", "6"], "--remove_blocks 6: at most 5 of 6 blocks can be removed"),
        (["--max-params", "0.01x"], "--max_params 0.01x: "),
        (["--max-params", "90000000"], "--max_params 90000000: the network has 14,516 parameters as it is"),
        (["--remove-blocks", "1", "--calibration_split", "test"], "--calibration_split test: no such split"),
        (["--remove-blocks", "1", "--eval_split", "test"], "--eval_split test: no such split"),
        (["--remove-blocks", "1", "--image_column", "label"], "--image_column label"),
        (["--remove-blocks", "1", "--label_column", "image"], "--label_column image"),
        (["--remove-blocks", "1", "--map", "low_rank", "--rank", "17"], "--rank 17"),
    ],
)
def test_options_against_model_and_data(refused, checkpoint, images, words, message):
    assert message in refused(checkpoint, images, *words)


def test_a_budget_is_checked_before_images_are_analysed(refused, checkpoint, images, monkeypatch):
    monkeypatch.setattr(run, "analyze", lambda *_, **__: pytest.fail("the analysis ran"))
    assert "at most 5 of 6" in refused(checkpoint, images, "--remove-blocks", "6")
    half = ["--max-flops", "0.01x", "--granularity", "half"]
    assert "--max_flops 0.01x: " in refused(checkpoint, images, *half)


def test_plans_that_do_not_fit(refused, checkpoint, images, tmp_path):
    plan = tmp_path / "plan.json"
    CompressionPlan(8, (Span(2, 3),)).save(plan)
    line = refused(checkpoint, images, "--plan", str(plan))
    assert "8" in line and "the model has 6" in line
    plan.write_text(json.dumps({"depth": 6, "spans": [{"start": 2, "end": 9}]}))
    assert "too long for 6 blocks" in refused(checkpoint, images, "--plan", str(plan))
    plan.write_text("{")
    assert "is not JSON" in refused(checkpoint, images, "--plan", str(plan))


def test_maps_that_a_family_cannot_have(refused, images, tmp_path):
    source = save_checkpoint(tmp_path / "clip", clip())
    line = refused(source, images, "--remove-blocks", "1", "--map", "linear")
    assert "--map linear: a CLIPModel can have fold and identity only" in line
    line = refused(source, images, "--max_flops", "0.8x", "--granularity", "half")
    assert "--granularity half: halves of a CLIPModel cannot be replaced" in line
    CompressionPlan(DEPTH, (), (Half(2, "mlp", "linear"),)).save(tmp_path / "plan.json")
    assert "--plan: halves of a CLIPModel" in refused(source, images, "--plan", str(tmp_path / "plan.json"))


def test_models_that_are_none(refused, images, tmp_path):
    one = ["--remove-blocks", "1"]
    assert "there is no such folder" in refused(tmp_path / "nowhere" / "model", images, *one)
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in refused(tmp_path / "empty", images, *one)
    assert "is a file" in refused(images, images, *one)
    line = refused(save_checkpoint(tmp_path / "vit"), images, *one, "--model_revision", "v1")
    assert "--model_revision v1: " in line and "has no revisions" in line
    bert = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    line = refused(save_checkpoint(tmp_path / "bert", BertModel(bert)), images, *one)
    assert "BertModel, which is not supported: take one of" in line and "CLIPModel" in line


def test_weights_that_are_not_whole(refused, images, tmp_path):
    nan = vit()
    with torch.no_grad():
        nan.vit.layers[2].mlp.fc1.weight[0, 0] = torch.nan
    line = refused(save_checkpoint(tmp_path / "nan", nan), images, "--remove-blocks", "1")
    assert "layers.2.mlp.fc1.weight holds NaN or infinity" in line
    cut = tmp_path / "cut"
    save_checkpoint(cut)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "it cannot be loaded" in refused(cut, images, "--remove-blocks", "1")


def test_images_that_are_none(refused, checkpoint, tmp_path):
    one = ["--remove-blocks", "1"]
    assert "there is no such file or folder" in refused(checkpoint, tmp_path / "none.parquet", *one)
    pq.write_table(pa.table({"text": ["a"] * 9}), tmp_path / "text.parquet")
    assert "no column holds images" in refused(checkpoint, tmp_path / "text.parquet", *one)
    few = write_images(tmp_path / "few.parquet", 3)
    assert "at least 3 are needed" in refused(checkpoint, few, *one)
    broken = write_images(tmp_path / "broken.parquet", 30, broken=range(2, 30))
    assert "images cannot be read" in refused(checkpoint, broken, *one)


def test_constant_images_without_ridge(refused, tmp_path):
    table = pa.table({"image": [{"bytes": png(0), "path": None}] * 30})
    pq.write_table(table, tmp_path / "same.parquet")
    # 17 different tokens in all, fewer than features
    line = refused(wide(tmp_path, 32, 4), tmp_path / "same.parquet", "--remove-blocks", "1", "--ridge", "0")
    assert "ridge" in line


def test_fewer_tokens_than_features(refused, images, tmp_path):
    line = refused(wide(tmp_path, 96, 8), images, "--remove-blocks", "1", "--calibration-images", "20")
    assert "--calibration_images" in line and "fewer than the 96 features" in line


def test_folders_that_hold_something(checkpoint, images, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    words = ["compress", checkpoint, "--dataset", images, "--output", str(tmp_path / "out"), "--remove-blocks", "1"]
    assert main(words) == 2
    assert "already holds files (letter.txt" in capsys.readouterr().err
    (tmp_path / "out" / "model.safetensors").write_text("")
    assert main([*words, "--overwrite_output_dir"]) == 2
    assert "holds model.safetensors but no redundancy.json" in capsys.readouterr().err
    assert (tmp_path / "out" / "letter.txt").read_text() == "dear"
