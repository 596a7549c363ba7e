"""What the options leave open becomes numbers, and is explained."""

import math

import pytest

from hf_simprune.dino.resolve import defaults_for_size, describe, resolve
from hf_simprune.errors import InputError

from .make_arguments import make_arguments


class TestResolve:
    def test_published_run(self):
        found = resolve(make_arguments(), num_images=1_281_167, world_size=16)
        assert (found.global_batch, found.steps_per_epoch) == (1024, 1251)
        assert (found.total_steps, found.warmup_steps, found.freeze_last_layer_steps) == (125_100, 12_510, 1251)
        assert found.learning_rate == pytest.approx(0.002)
        assert (found.out_dim, found.teacher_temp, found.momentum_teacher) == (65_536, 0.04, 0.996)
        assert (found.blur_prob, found.solarize_prob) == ((1.0, 0.1, 0.5), (0.0, 0.2, 0.0))
        assert (found.warmup_teacher_temp_intervals, found.teacher_temp_interval) == (0, 1251)
        assert (found.max_grad_norm, found.clip_grad) == (3.0, None)

    def test_global_batch_counts_processes_and_accumulation(self):
        arguments = make_arguments(
            per_device_train_batch_size=8, gradient_accumulation_steps=3, base_learning_rate=1e-3, num_train_epochs=2.0
        )
        found = resolve(arguments, num_images=100, world_size=2)
        assert found.global_batch == 48
        assert found.steps_per_epoch == 2  # the last 4 images wait for the next epoch
        assert found.total_steps == 4
        assert found.learning_rate == pytest.approx(1e-3 * 48 / 256)

    def test_an_absolute_learning_rate_does_not_depend_on_the_batch(self):
        for world_size in (1, 4):
            assert resolve(make_arguments(learning_rate=3e-4), 10_000, world_size).learning_rate == 3e-4

    def test_a_batch_larger_than_the_data_set_is_refused(self):
        with pytest.raises(InputError, match="larger than the data set, 63 images"):
            resolve(make_arguments(), num_images=63, world_size=1)

    def test_max_steps_replaces_epochs_and_part_epochs_round_up(self):
        assert resolve(make_arguments(max_steps=7), 640, 1).total_steps == 7
        assert resolve(make_arguments(num_train_epochs=0.25), 640, 1).total_steps == 3
        assert resolve(make_arguments(num_train_epochs=1.1), 640, 1).total_steps == 11

    def test_warmups_in_steps_and_in_epochs(self):
        given = resolve(
            make_arguments(warmup_steps=30, freeze_last_layer_steps=20, warmup_teacher_temp_steps=50), 640, 1
        )
        assert (given.warmup_steps, given.freeze_last_layer_steps) == (30, 20)
        assert (given.warmup_teacher_temp_intervals, given.teacher_temp_interval) == (50, 1)
        given = resolve(
            make_arguments(warmup_epochs=2.5, freeze_last_layer=0.0, warmup_teacher_temp_epochs=30), 640, 1
        )
        assert (given.warmup_steps, given.freeze_last_layer_steps) == (25, 0)
        assert (given.warmup_teacher_temp_intervals, given.teacher_temp_interval) == (30, 10)

    def test_default_warmup_is_capped_in_a_short_run_and_says_so(self):
        found = resolve(make_arguments(max_steps=20), 640, 1)
        assert (found.warmup_steps, found.freeze_last_layer_steps) == (4, 4)
        assert "chosen: warmup_steps 4: a fifth of this short run" in "\n".join(describe(found))

    @pytest.mark.parametrize(
        "values", [{"warmup_steps": 21}, {"warmup_epochs": 2.1}, {"warmup_teacher_temp_epochs": 3}]
    )
    def test_a_given_warmup_longer_than_the_run_is_refused(self, values):
        option = next(iter(values))
        with pytest.raises(InputError, match=f"--{option} .* the run has 20"):
            resolve(make_arguments(max_steps=20, **values), 640, 1)

    def test_clipping_is_one_of_two_kinds_or_off(self):
        assert resolve(make_arguments(clip_grad=0.3), 640, 1).max_grad_norm is None
        assert resolve(make_arguments(clip_grad=0.3), 640, 1).clip_grad == 0.3
        assert resolve(make_arguments(max_grad_norm=1.0), 640, 1).max_grad_norm == 1.0
        off = resolve(make_arguments(max_grad_norm=0.0), 640, 1)
        assert (off.max_grad_norm, off.clip_grad) == (None, None)

    def test_blur_and_solarise_are_off_below_64_pixels_unless_given(self):
        small = {"architecture": "vit_micro", "image_size": 60}
        found = resolve(make_arguments(**small), 640, 1)
        assert found.blur_prob == found.solarize_prob == (0.0, 0.0, 0.0)
        assert "chosen: blur_prob 0 0 0: off for crops below 64 px" in describe(found)
        assert resolve(make_arguments(**small, blur_prob=[1.0, 0.5, 0.1]), 640, 1).blur_prob == (1.0, 0.5, 0.1)
        large = make_arguments(architecture="vit_micro", image_size=64, local_crop_size=48)
        assert resolve(large, 640, 1).blur_prob == (1.0, 0.1, 0.0)

    def test_small_sets_get_a_smaller_head_and_a_sharper_faster_teacher(self):
        tiny, large = defaults_for_size(20), defaults_for_size(10_000_000)
        assert (tiny.out_dim, tiny.teacher_temp, tiny.momentum_teacher) == (1024, 0.02, 0.99)
        assert (large.out_dim, large.teacher_temp, large.momentum_teacher) == (65_536, 0.04, 0.996)
        assert defaults_for_size(20_000).out_dim == 1024
        middle = defaults_for_size(round(math.sqrt(20_000 * 1_281_167)))  # halfway on the logarithmic scale
        assert (middle.out_dim, middle.teacher_temp, middle.momentum_teacher) == (8192, 0.03, 0.993)
        sizes = [defaults_for_size(n) for n in (20_000, 50_000, 100_000, 400_000, 1_281_167)]
        for earlier, later in zip(sizes, sizes[1:], strict=False):
            assert earlier.out_dim <= later.out_dim
            assert earlier.teacher_temp < later.teacher_temp
            assert earlier.momentum_teacher < later.momentum_teacher

    def test_auto_scale_is_printed_and_given_values_win(self):
        found = resolve(make_arguments(auto_scale=True, teacher_temp=0.05), 1797, 1)
        assert (found.out_dim, found.teacher_temp, found.momentum_teacher) == (1024, 0.05, 0.99)
        lines = describe(found)
        assert "chosen: out_dim 1024: --auto_scale for 1,797 images" in lines
        assert not any("teacher_temp 0.05" in line for line in lines)

    def test_without_auto_scale_nothing_is_adapted_to_the_data(self):
        found = resolve(make_arguments(), 1797, 1)
        assert (found.out_dim, found.teacher_temp, found.momentum_teacher) == (65_536, 0.04, 0.996)

    def test_the_peak_learning_rate_and_token_counts_are_printed(self):
        lines = "\n".join(describe(resolve(make_arguments(), 1_281_167, 16)))
        assert "peak learning rate 0.002" in lines
        assert "196 → 157 → 126 → 101" in lines
        assert "36 → 29 → 24 → 20" in lines

    def test_what_is_given_is_not_called_chosen(self):
        given = make_arguments(
            architecture="vit_small", local_crop_size=96, reduction_layers=[3, 6, 9], learning_rate=1e-3,
            max_grad_norm=3.0, warmup_epochs=10.0, freeze_last_layer=1.0, out_dim=65536, teacher_temp=0.04,
            momentum_teacher=0.996, blur_prob=[1.0, 0.1, 0.5], solarize_prob=[0.0, 0.2, 0.0],
        )  # fmt: skip
        assert resolve(given, 1_281_167, 16).notes == ()

    def test_a_stream_of_unknown_length_counts_in_steps(self):
        with pytest.raises(InputError, match="--max_steps is needed"):
            resolve(make_arguments(), None, 1)
        found = resolve(make_arguments(max_steps=1000), None, 1)
        assert (found.steps_per_epoch, found.total_steps) == (None, 1000)
        assert (found.warmup_steps, found.freeze_last_layer_steps) == (100, 10)
        with pytest.raises(InputError, match="--warmup_epochs 2: .* use --warmup_steps"):
            resolve(make_arguments(max_steps=1000, warmup_epochs=2.0), None, 1)
        with pytest.raises(InputError, match="--auto_scale needs the number of images"):
            resolve(make_arguments(max_steps=1000, auto_scale=True), None, 1)

    def test_the_final_learning_rate_may_not_exceed_the_peak(self):
        with pytest.raises(InputError, match="--min_learning_rate 0.01 is above the peak learning rate 0.001"):
            resolve(make_arguments(learning_rate=1e-3, min_learning_rate=1e-2), 640, 1)
