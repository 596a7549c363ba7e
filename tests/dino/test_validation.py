"""Values, combinations and sizes are checked before anything is loaded."""

import math
from dataclasses import replace

import pytest
from transformers import ViTConfig

from hf_simprune.dino.geometry import OVERRIDE_KINDS, default_local_crop_size, geometry, parse_config_overrides
from hf_simprune.dino.validation import check_batch_size, check_precision, hub_model_id, tracker_names, validate
from hf_simprune.errors import InputError
from hf_simprune.models import SimPruneViTConfig
from hf_simprune.models.architectures import DINOV2_OVERRIDES, OVERRIDES

from .make_arguments import make_arguments


class TestValidation:
    def test_defaults_pass(self):
        validate(make_arguments())

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"keep_rate": 0.0}, "--keep_rate 0.0: must be above 0 and at most 1"),
            ({"keep_rate": 1.01}, "--keep_rate 1.01: must be above 0 and at most 1"),
            ({"keep_rate": math.nan}, "--keep_rate nan: must be a finite number"),
            ({"learning_rate": 0.0}, "--learning_rate 0.0: must be a number above 0"),
            ({"learning_rate": math.inf}, "--learning_rate inf: must be a finite number"),
            ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0"),
            ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0"),
            ({"num_train_epochs": 0.0}, "--num_train_epochs 0.0"),
            ({"max_steps": 0}, "--max_steps 0: must be -1"),
            ({"max_steps": -2}, "--max_steps -2: must be -1"),
            ({"save_steps": 0}, "--save_steps 0"),
            ({"save_total_limit": 0}, "--save_total_limit 0"),
            ({"warmup_steps": -1}, "--warmup_steps -1: must be 0 or more"),
            ({"drop_path_rate": 1.0}, "--drop_path_rate 1.0"),
            ({"hflip_prob": 1.1}, "--hflip_prob 1.1: must be from 0 to 1"),
            ({"momentum_teacher": -0.1}, "--momentum_teacher -0.1"),
            ({"out_dim": 1}, "--out_dim 1: must be 2 or more"),
            ({"token_reduction": "evict"}, "--token_reduction evict is unknown: choose one of none, random, simprune"),
            ({"curriculum": "steep"}, "--curriculum steep is unknown: choose one of linear, easy, hard, step"),
            ({"matching": "both"}, "--matching both is unknown: choose one of one_way, symmetric"),
            ({"on_bad_image": "cry"}, "--on_bad_image cry is unknown: choose one of skip, error"),
            ({"hub_strategy": "all_checkpoints"}, "--hub_strategy all_checkpoints is unknown"),
            ({"attn_implementation": "fast"}, "--attn_implementation fast is unknown"),
            ({"architecture": "vit_huge"}, "--architecture vit_huge is unknown: choose one of vit_micro, vit_tiny"),
            ({"learning_rate": 1e-3, "base_learning_rate": 1e-3}, "--learning_rate 0.001 and --base_learning_rate"),
            (
                {"architecture": "vit_tiny", "model_name_or_path": "x"},
                "--architecture vit_tiny and --model_name_or_path",
            ),
            (
                {"config_overrides": "a=1", "model_name_or_path": "x"},
                "--config_overrides a=1 and --model_name_or_path x",
            ),
            ({"max_grad_norm": 3.0, "clip_grad": 3.0}, "--max_grad_norm 3.0 and --clip_grad 3.0 exclude each other"),
            ({"warmup_epochs": 1.0, "warmup_steps": 5}, "--warmup_epochs 1.0 and --warmup_steps 5"),
            ({"warmup_teacher_temp_epochs": 1, "warmup_teacher_temp_steps": 5}, "--warmup_teacher_temp_epochs 1 and"),
            ({"freeze_last_layer": 1.0, "freeze_last_layer_steps": 0}, "--freeze_last_layer 1.0 and"),
            ({"bf16": True, "fp16": True}, "--bf16 and --fp16 exclude each other"),
            (
                {"overwrite_output_dir": True, "resume_from_checkpoint": "latest"},
                "--overwrite_output_dir and --resume",
            ),
            ({"global_crops_scale": [0.4]}, "--global_crops_scale 0.4: give two shares"),
            ({"local_crops_scale": [0.5, 0.2]}, "--local_crops_scale 0.5 0.2: give two shares"),
            ({"local_crops_scale": [0.0, 0.2]}, "--local_crops_scale 0 0.2: give two shares"),
            ({"global_crops_scale": [0.4, 1.2]}, "--global_crops_scale 0.4 1.2: give two shares"),
            ({"blur_prob": [1.0, 0.1]}, "--blur_prob 1 0.1: give three probabilities"),
            ({"solarize_prob": [0.0, 0.2, 2.0]}, "--solarize_prob 0 0.2 2: give three probabilities"),
            ({"color_jitter": [0.4, 0.4, 0.2]}, "--color_jitter 0.4 0.4 0.2: give brightness"),
            ({"color_jitter": [0.4, 0.4, 0.2, 0.6]}, "--color_jitter 0.4 0.4 0.2 0.6: give brightness"),
            ({"reduction_layers": []}, "--reduction_layers is empty"),
            ({"report_to": "tensorbored"}, "'tensorbored' is unknown: use none, all or tensorboard"),
            ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "--hub_model_id a/b/c cannot name a repository"),
            (
                {"model_name_or_path": "no/such-folder-here"},
                "--model_name_or_path no/such-folder-here: no model there",
            ),
        ],
    )
    def test_bad_values_are_one_line_that_names_the_option(self, values, message):
        with pytest.raises(InputError) as caught:
            validate(make_arguments(**values))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ("num_hidden_layers", "'num_hidden_layers' is not of the form name=value"),
            ("hiden_size=128", "unknown setting hiden_size; known: hidden_size"),
            ("num_hidden_layers=four", "num_hidden_layers must be a whole number, got four"),
            ("qkv_bias=maybe", "qkv_bias must be true or false, got maybe"),
            ("num_hidden_layers=0", "num_hidden_layers must be at least 1"),
            ("hidden_dropout_prob=1", "hidden_dropout_prob must be from 0 up to, not including, 1"),
            ("hidden_act=step", "hidden_act step is unknown"),
            ("patch_size=8", "patch_size has an option of its own, --patch_size"),
            ("hidden_size=64,hidden_size=32", "hidden_size is given twice"),
            ("hidden_size=100,num_attention_heads=3", "hidden_size 100 is no multiple of num_attention_heads 3"),
        ],
    )
    def test_config_overrides_are_checked(self, overrides, message):
        with pytest.raises(InputError, match="^--config_overrides") as caught:
            validate(make_arguments(architecture="vit_micro", config_overrides=overrides))
        assert message in str(caught.value)

    def test_config_overrides_are_typed(self):
        text = "num_hidden_layers=4, layer_norm_eps=1e-5,qkv_bias=False,hidden_act=relu"
        expected = {"num_hidden_layers": 4, "layer_norm_eps": 1e-5, "qkv_bias": False, "hidden_act": "relu"}
        assert parse_config_overrides(text) == expected
        assert parse_config_overrides(None) == {}

    def test_config_overrides_are_those_an_architecture_takes_but_for_colour_channels(self):
        assert {*OVERRIDE_KINDS, "num_channels"} == {*OVERRIDES, *DINOV2_OVERRIDES} - {"use_mask_token"}

    @pytest.mark.parametrize(
        ("options", "configured", "device", "expected"),
        [
            ({}, None, "cpu", "no"),
            ({}, "no", "cpu", "no"),
            ({}, "bf16", "cpu", "bf16"),
            ({}, "fp16", "cuda", "fp16"),
            ({"bf16": True}, None, "cpu", "bf16"),
            ({"bf16": True}, "no", "cpu", "bf16"),  # what a launch without a precision passes on
            ({"bf16": True}, "bf16", "cuda", "bf16"),
            ({"fp16": True}, "no", "cuda", "fp16"),
        ],
    )
    def test_precision_comes_from_the_flag_or_from_accelerate(self, options, configured, device, expected):
        assert check_precision(make_arguments(**options), configured, device) == expected

    @pytest.mark.parametrize(
        ("options", "configured", "device", "message"),
        [
            ({"bf16": True}, "fp16", "cuda", "--bf16 contradicts accelerate's mixed precision fp16"),
            ({"fp16": True}, "bf16", "cuda", "--fp16 contradicts accelerate's mixed precision bf16"),
            ({"fp16": True}, "no", "cpu", "--fp16: there is no fp16 training on the CPU"),
            ({}, "fp16", "cpu", "accelerate's mixed precision fp16: there is no fp16 training on the CPU"),
            ({}, "fp8", "cuda", "accelerate's mixed precision fp8 is not supported"),
        ],
    )
    def test_precision_conflicts_are_errors(self, options, configured, device, message):
        with pytest.raises(InputError, match=message):
            check_precision(make_arguments(**options), configured, device)

    def test_batch_may_be_as_large_as_the_data_set_but_no_larger(self):
        check_batch_size(64, 64)
        with pytest.raises(InputError, match="global batch of 65 images .* is larger than the data set, 64 images"):
            check_batch_size(64, 65)

    def test_trackers(self):
        assert tracker_names("none") == []
        assert tracker_names("tensorboard") == ["tensorboard"]
        assert "tensorboard" in tracker_names("all")
        with pytest.raises(InputError, match="clearml is not installed"):
            tracker_names("tensorboard,clearml")

    def test_repository_defaults_to_the_folder_name(self):
        assert hub_model_id(make_arguments(output_dir="outputs/vit-dino/")) == "vit-dino"
        assert hub_model_id(make_arguments(hub_model_id="me/vit")) == "me/vit"
        with pytest.raises(InputError, match="takes the name of the folder: a b cannot name"):
            validate(make_arguments(output_dir="a b", push_to_hub=True))


class TestGeometry:
    def test_published_sizes(self):
        found = geometry(make_arguments())
        assert (found.name, found.depth, found.image_size, found.patch_size) == ("vit_small", 12, 224, 16)
        assert (found.global_crop_size, found.local_crop_size) == (224, 96)
        assert found.reduction_layers == (3, 6, 9)
        assert found.global_counts == (196, 157, 126, 101)
        assert found.local_counts == (36, 29, 24, 20)

    @pytest.mark.parametrize(
        ("crop", "patch", "expected"),
        [(224, 16, 96), (224, 8, 96), (24, 4, 12), (32, 4, 12), (8, 1, 3), (384, 16, 160)],
    )
    def test_local_crops_keep_the_published_proportion_in_whole_patches(self, crop, patch, expected):
        assert default_local_crop_size(crop, patch) == expected
        candidates = range(patch, crop + 1, patch)
        assert expected == min(candidates, key=lambda size: abs(size - crop * 96 / 224))

    def test_dense_training_reduces_nowhere(self):
        found = geometry(make_arguments(token_reduction="none", reduction_layers=[1]))
        assert found.reduction_layers == ()
        assert found.global_counts == (196,)

    def test_layers_follow_the_overridden_depth(self):
        values = {"architecture": "vit_micro", "config_overrides": "num_hidden_layers=4", "image_size": 32}
        assert geometry(make_arguments(**values, local_crop_size=16)).reduction_layers == (1, 2, 3)
        with pytest.raises(InputError, match="reduction_layers contains 4"):
            geometry(make_arguments(**values, local_crop_size=16, reduction_layers=[1, 4]))

    @pytest.mark.parametrize("layers", [[3, 12], [-1, 3]])
    def test_a_layer_out_of_range_is_refused(self, layers):
        with pytest.raises(InputError, match="reduction_layers contains (12|-1): a model of 12 blocks has 0 to 11"):
            validate(make_arguments(reduction_layers=layers))

    def test_a_repeated_layer_is_refused(self):
        with pytest.raises(InputError, match="reduction_layers repeats"):
            validate(make_arguments(reduction_layers=[3, 6, 3]))

    @pytest.mark.parametrize(
        ("option", "size", "advice"),
        [("global_crop_size", 230, "224 or 240"), ("local_crop_size", 100, "96 or 112"), ("image_size", 7, "use 16")],
    )
    def test_a_size_that_is_no_multiple_of_the_patch_is_refused(self, option, size, advice):
        with pytest.raises(InputError, match=f"--{option} {size} is no multiple of the patch size 16: .*{advice}"):
            validate(make_arguments(**{option: size}))

    def test_too_few_local_patches_are_refused_with_settings_that_work(self):
        values = {"keep_rate": 0.3, "local_crop_size": 64}
        with pytest.raises(InputError) as caught:
            validate(make_arguments(**values))
        # ceil(16 * 0.3) = 5, ceil(5 * 0.3) = 2, ceil(2 * 0.3) = 1
        assert "--local_crop_size 64 gives 16 patches, of which blocks 3, 6, 9 would keep 5, 2, 1" in str(caught.value)
        words = str(caught.value).split()
        size, rate = int(words[words.index("--local_crop_size", 1) + 1]), float(words[words.index("--keep_rate") + 1])
        validate(make_arguments(**values | {"local_crop_size": size}))
        validate(make_arguments(**values | {"keep_rate": rate}))
        for smaller in ({"local_crop_size": size - 16}, {"keep_rate": rate - 0.01}):
            with pytest.raises(InputError, match="at least 4 must stay"):
                validate(make_arguments(**values | smaller))
        validate(make_arguments(**values, token_reduction="none"))
        validate(make_arguments(**values, local_crops_number=0))

    def test_four_patches_left_are_enough(self):
        # 9 patches of a 48 px crop: ceil(0.7 * 9) = 7, 5, 4
        assert geometry(make_arguments(keep_rate=0.7, local_crop_size=48)).local_counts == (9, 7, 5, 4)

    def test_sizes_come_from_a_checkpoint(self, tmp_path):
        config = ViTConfig(num_hidden_layers=8, image_size=64, patch_size=8, hidden_size=32, num_attention_heads=2)
        config.save_pretrained(tmp_path)
        arguments = make_arguments(model_name_or_path=str(tmp_path))
        found = geometry(arguments)
        assert (found.depth, found.image_size, found.patch_size) == (8, 64, 8)
        assert found.reduction_layers == (2, 4, 6)
        assert geometry(replace(arguments, global_crop_size=96)).global_crop_size == 96
        with pytest.raises(InputError, match="--image_size 96: .* was made for 64 pixels"):
            geometry(replace(arguments, image_size=96))
        with pytest.raises(InputError, match="--patch_size 16: the patches of .* have 8 pixels a side"):
            geometry(replace(arguments, patch_size=16))

    def test_a_checkpoint_that_reduces_tokens_is_refused(self, tmp_path):
        SimPruneViTConfig(token_reduction="evit", keep_rate=0.7).save_pretrained(tmp_path)
        with pytest.raises(InputError, match="reduces tokens at inference .token_reduction evit"):
            geometry(make_arguments(model_name_or_path=str(tmp_path)))

    def test_a_checkpoint_of_another_family_is_refused(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(InputError, match="a bert model; DINO starts from vit, deit"):
            geometry(make_arguments(model_name_or_path=str(tmp_path)))
