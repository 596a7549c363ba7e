"""Whole runs of DINOv2, as typed: what they leave behind, resumption, bad input."""

import json
import math
import os
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, Dinov2Model, ViTModel

from hf_simprune.dino.argument_parsing import parse_arguments
from hf_simprune.dino.export import load_teacher_backbone
from hf_simprune.dino.geometry import geometry
from hf_simprune.dino.online_knn import OnlineKnn
from hf_simprune.dino.validation import validate
from hf_simprune.errors import InputError, TrainingInterrupted

from ...recipes.test_train_dino_bad_input import load_recipe
from ...tiny_run import ROOT, losses, metrics, untimed, words


TINY = {
    "architecture": "dinov2_tiny",
    "config_overrides": "hidden_size=24,num_hidden_layers=4,num_attention_heads=2,layerscale_value=0.5",
    "objective": "dinov2",
    "mask_probability": 0.8,
}


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The recipe's settings, made smaller, through the recipe."""
    folder = tmp_path_factory.mktemp("finished") / "dinov2-run"
    os.environ["ACCELERATE_USE_CPU"] = "true"
    AcceleratorState._reset_state(True)
    smaller = {
        "config": ROOT / "recipes" / "cifar10_dinov2_micro.yaml", "output_dir": folder, "image_size": 16,
        "dataset_name_or_path": images, "global_crop_size": 16, "local_crop_size": 12, "max_steps": 4, "knn_k": 5,
        "config_overrides": TINY["config_overrides"], "per_device_train_batch_size": 8, "out_dim": 32,
        "head_hidden_dim": 16, "head_bottleneck_dim": 8, "logging_steps": 1, "warmup_epochs": 0,
        "mask_probability": 0.9,
    }  # fmt: skip
    line = [word for name, value in smaller.items() for word in (f"--{name}", str(value))]
    assert load_recipe().main([*line, "--disable_tqdm", "true"]) == 0
    del os.environ["ACCELERATE_USE_CPU"]
    return folder


def test_the_result_is_a_stock_dinov2_with_the_teachers_weights(finished):
    config = json.loads((finished / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("dinov2", ["Dinov2Model"])
    model, info = AutoModel.from_pretrained(finished, output_loading_info=True)
    assert type(model) is Dinov2Model
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    teacher = load_teacher_backbone(finished).eval()
    trained = load_file(finished / "checkpoint-4" / "teacher.safetensors")
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, trained[f"backbone.{name}"]), name
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    masks = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        tokens = teacher.embed(pixels, masks)
        for layer in teacher.layers:
            tokens = layer(tokens)
        stock = model.eval()(pixels, bool_masked_pos=masks)
    assert torch.equal(teacher.layernorm(tokens), stock.last_hidden_state)
    assert teacher.embeddings.mask_token.abs().max() > 0  # it began at 0


def test_card_pictures_heads_and_metrics_are_there(finished):
    card = (finished / "README.md").read_text()
    assert "`Dinov2Model`" in card and "keep rate 0.7" in card and "- dinov2" in card
    assert (
        "by\n[DINOv2](https://huggingface.co/papers/2304.07193)'s objective while" in card
        and "{oquab2024dinov2" in card
    )
    for name in ("loss_curve.png", "pruned_tokens.png"):
        with Image.open(finished / name) as picture:
            assert min(picture.size) > 300
    heads = [load_file(finished / "training" / f"teacher{kind}_head.safetensors") for kind in ("", "_patch")]
    assert heads[0].keys() == heads[1].keys()
    assert not torch.equal(heads[0]["mlp.0.weight"], heads[1]["mlp.0.weight"])
    records = [record for record in metrics(finished) if "loss" in record]
    assert len(records) == 4
    names = ("dino_loss", "ibot_loss", "koleo_loss", "masked_tokens", "masked_tokens_kept", "window_offset")
    for record in records:
        assert all(math.isfinite(record[name]) for name in names)
        assert 0 <= record["masked_tokens_kept"] <= record["masked_tokens"] <= 8
    assert records[-1]["masked_tokens"] > 0


@pytest.mark.parametrize("options", [{"centering": "centering", "dataloader_num_workers": 1}, {"streaming": True}])
def test_an_interrupted_and_resumed_run_equals_the_undisturbed_one(train, monkeypatch, options):
    options = {**TINY, "max_steps": 4, **options}
    straight = train("straight", knn_every=2, **options)
    evaluate = OnlineKnn.__call__

    def interrupted(self, step, stopped):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, step, stopped)

    monkeypatch.setattr(OnlineKnn, "__call__", interrupted)
    with pytest.raises(TrainingInterrupted, match="after step 2"):
        train("parts", knn_every=2, **options)
    monkeypatch.setattr(OnlineKnn, "__call__", evaluate)
    parts = train("parts", knn_every=2, resume_from_checkpoint="latest", **options)
    assert untimed(parts) == untimed(straight)
    assert (parts / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_dino_trains_a_dinov2_network_whose_mask_token_stays(train):
    options = {key: TINY[key] for key in ("architecture", "config_overrides")}
    folder = train(max_steps=2, **options)
    assert type(AutoModel.from_pretrained(folder)) is Dinov2Model
    assert load_file(folder / "model.safetensors")["embeddings.mask_token"].abs().max() == 0


def test_dinov2_trains_a_vit_and_goes_on_from_the_result(train):
    first = train("first", architecture="vit_micro", max_steps=2, objective="dinov2", bf16=True)
    model, loading = AutoModel.from_pretrained(first, output_loading_info=True)
    assert type(model) is ViTModel and not any(loading.values())  # stock ViTs have no mask token
    again = {"architecture": None, "config_overrides": None, "patch_size": None, "image_size": None, "max_steps": 1}
    second = train("second", objective="dinov2", model_name_or_path=first, warmup_steps=0, **again)
    assert all(math.isfinite(loss) for loss in losses(second))
    assert load_teacher_backbone(second).embeddings.mask_token is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio_max": 1.2}, "--mask_ratio_max 1.2: must be from 0 up to, not including, 1"),
        ({"mask_ratio_min": -0.1}, "--mask_ratio_min -0.1: must be from 0 up to"),
        ({"mask_ratio_min": 0.6}, "--mask_ratio_min 0.6 is above --mask_ratio_max 0.5"),
        ({"mask_probability": 1.5}, "--mask_probability 1.5: must be from 0 to 1"),
        ({"objective": "dinov3"}, "--objective dinov3 is unknown: choose one of dino, dinov2"),
        ({"centering": "mean"}, "--centering mean is unknown: choose one of sinkhorn_knopp, centering"),
        ({"masked_policy": "drop"}, "--masked_policy drop is unknown: choose one of pair, keep"),
        ({"koleo_loss_weight": -1.0}, "--koleo_loss_weight -1.0: must be 0 or more"),
        ({"per_device_train_batch_size": 1}, "--per_device_train_batch_size 1: KoLeo compares the images of a batch"),
        (
            {"dino_loss_weight": 0.0, "ibot_loss_weight": 0.0, "koleo_loss_weight": 0.0},
            "--koleo_loss_weight 0: nothing is left to train on",
        ),
        ({"token_reduction": "tome"}, "--token_reduction tome: with --objective dinov2 every token must stay"),
        (
            {"masked_policy": "keep", "keep_rate": 0.6, "local_crops_number": 0},
            "--masked_policy keep: --mask_ratio_max 0.5 masks up to 8 of 16 patches and the last stage keeps 4: use "
            "at most --mask_ratio_max 0.25, a larger --keep_rate, or --masked_policy pair",
        ),
        ({"masked_policy": "keep", "token_reduction": "random"}, "--masked_policy keep: it belongs to"),
        ({"objective": "dino"}, "--mask_probability 0.8: it belongs to --objective dinov2; leave it out"),
        ({"architecture": "vit_micro"}, "layerscale_value is of DINOv2 networks, not of vit_micro"),
        ({"config_overrides": "intermediate_size=100"}, "intermediate_size 100 is no multiple of hidden_size 192"),
    ],
)
def test_bad_input_is_refused_in_one_line(options, message):
    args = parse_arguments(words(output_dir="out", dataset_name_or_path="data", **TINY | options))
    with pytest.raises(InputError) as caught:
        validate(args)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_dinov2_starts_from_its_own_architecture_by_default():
    line = words(output_dir="out", dataset_name_or_path="data", objective="dinov2", architecture=None, patch_size=None)
    args = parse_arguments([*line, "--image_size", "224", "--local_crop_size", "98", "--config_overrides", ""])
    assert (geometry(args).name, geometry(args).patch_size) == ("dinov2_small", 14)
