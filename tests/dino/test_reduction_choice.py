"""The options of token reduction: what a run builds from them, and what is refused before anything is loaded."""

import io
from contextlib import redirect_stdout
from dataclasses import asdict

import pytest
import torch

from hf_simprune.dino.argument_parsing import parse_arguments
from hf_simprune.dino.build import build_dual_branch
from hf_simprune.dino.geometry import geometry
from hf_simprune.dino.reduction_choice import chosen_options, chosen_reducer, keep_rate_counts
from hf_simprune.dino.resolve import describe, resolve
from hf_simprune.dino.run import UNCHANGED_ON_RESUME, loop_settings, window_description
from hf_simprune.dino.validation import validate
from hf_simprune.errors import InputError
from hf_simprune.reduction import METHODS, REDUCTIONS, ReductionSetting

from .conftest import tiny_schedules
from .make_arguments import make_arguments


SMALL = {
    "architecture": "vit_micro",
    "config_overrides": "hidden_size=24,num_hidden_layers=4,num_attention_heads=2,intermediate_size=48",
    "image_size": 32,
    "local_crop_size": 20,
    "out_dim": 16,
    "head_hidden_dim": 16,
    "head_bottleneck_dim": 8,
}


def small(**values):
    return make_arguments(**SMALL, **values)


class TestWhatIsBuilt:
    @pytest.mark.parametrize("name", list(METHODS))
    def test_every_method_with_its_defaults_at_the_published_sizes(self, name):
        validate(make_arguments(token_reduction=name))
        found = geometry(make_arguments(token_reduction=name))
        assert found.reduction_layers == (3, 6, 9)
        assert found.setting == ReductionSetting((3, 6, 9), 12, 384, 6, 1, ((14, 14), (6, 6)))
        assert found.global_counts[0] == 196 and found.global_counts[-1] < 130
        assert found.local_counts[0] == 36
        assert found.local_counts[-1] < 30

    def test_the_setting_is_that_of_the_network_and_its_crops(self):
        found = geometry(small(token_reduction="tome", reduction_layers=[0, 2], local_crops_number=0))
        assert found.setting == ReductionSetting((0, 2), 4, 24, 2, 1, ((8, 8),))
        assert geometry(make_arguments(architecture="deit_tiny")).setting.num_prefix == 2
        assert geometry(make_arguments(token_reduction="none")).setting is None

    def test_options_reach_the_reducer(self):
        arguments = small(token_reduction="evit", reduction_options="fuse=false")
        dual = build_dual_branch(arguments, resolve(arguments, 640, 1))
        assert (dual.reducer.name, dual.reducer.fuse, dual.reducer.keep_rate) == ("evit", False, 0.8)
        assert dual.reducer.setting == geometry(arguments).setting

    def test_matching_goes_to_the_methods_that_have_it(self):
        for name in ("simprune", "simprune_dynamic"):
            assert chosen_options(small(token_reduction=name, matching="symmetric")) == {"matching": "symmetric"}
        assert chosen_options(small(token_reduction="random", matching="symmetric")) == {}
        assert chosen_options(small(token_reduction="none")) == {}

    @pytest.mark.parametrize("name", list(METHODS))
    def test_a_method_leaves_the_networks_of_a_seed_as_they_are(self, name):
        dense, reduced = (
            build_dual_branch(arguments, resolve(arguments, 640, 1))
            for arguments in (small(token_reduction=reduction) for reduction in ("none", name))
        )
        for key, value in dense.state_dict().items():
            assert torch.equal(value, reduced.state_dict()[key]), key

    def test_a_schedule_of_its_own_is_followed_and_explained(self):
        options = {"token_reduction": "tome", "reduction_options": "schedule=every_layer,r=5"}
        lines = "\n".join(describe(resolve(small(**options), 640, 1)))
        assert "64 → 59 → 54 → 49 → 44" in lines
        assert "chosen: reduction_layers 0, 1, 2, 3: the method's own schedule" in lines

    @pytest.mark.parametrize(
        ("name", "options", "counts"),
        [
            ("tome", None, True),
            ("tome", "schedule=every_layer,r=2", False),
            ("expedit", "schedule=published", True),
            ("expedit", "schedule=published,grid=2", False),
            ("self_slimmed", None, True),
            ("random", None, True),
        ],
    )
    def test_whether_the_keep_rate_has_a_say(self, name, options, counts):
        args = small(token_reduction=name, reduction_options=options)
        assert keep_rate_counts(args, geometry(args).setting) == counts

    def test_counts_are_those_of_the_method(self):
        found = geometry(small(token_reduction="expedit", keep_rate=0.5))
        assert found.global_counts == (64, 36, 16, 9)  # sides 8, and 8 times the root of 1/2, 1/4 and 1/8, up
        assert geometry(small(token_reduction="evit", keep_rate=0.5)).global_counts == (64, 33, 18, 10)


class TestRefused:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"token_reduction": "tome", "keep_rate": 0.4}, "--token_reduction tome --keep_rate 0.4: keep_rate 0.4"),
            ({"token_reduction": "mctf", "keep_rate": 0.45}, "--token_reduction mctf --keep_rate 0.45: keep_rate"),
            ({"token_reduction": "simprune_dynamic", "keep_rate": 0.4}, "--token_reduction simprune_dynamic --keep"),
            (
                {"token_reduction": "tome", "reduction_options": "schedule=every_layer"},
                "--token_reduction tome --keep_rate 0.8 --reduction_options schedule=every_layer: ",
            ),
            (
                {"token_reduction": "expedit", "reduction_options": "schedule=published,grid=9"},
                "--token_reduction expedit --keep_rate 0.8 --reduction_options schedule=published,grid=9: ",
            ),
            (
                {"token_reduction": "evit", "reduction_options": "fused=false"},
                "--reduction_options fused=false: evit has no option fused: fuse",
            ),
            (
                {"token_reduction": "evit", "reduction_options": "fuse=maybe"},
                "--reduction_options fuse=maybe: fuse must be true or false, got maybe",
            ),
            ({"token_reduction": "evit", "reduction_options": "fuse"}, "'fuse' is not of the form name=value"),
            ({"token_reduction": "none", "reduction_options": "fuse=true"}, "none has no option fuse"),
            (
                {"token_reduction": "simprune", "reduction_options": "matching=symmetric"},
                "--reduction_options matching=symmetric: matching has an option of its own, --matching",
            ),
            (
                {"token_reduction": "tome", "reduction_options": "schedule=every_layer,r=4", "reduction_layers": [1]},
                "--reduction_layers 1: --token_reduction tome --keep_rate 0.8 --reduction_options schedule=every_lay",
            ),
            (
                {"token_reduction": "tome", "attn_implementation": "flash_attention_2"},
                "--attn_implementation flash_attention_2: it cannot count a merged token by its size",
            ),
            (
                {"token_reduction": "self_slimmed", "reduction_options": "recalibration=-1"},
                "--token_reduction self_slimmed --keep_rate 0.8 --reduction_options recalibration=-1: recalibration",
            ),
            (
                {"token_reduction": "tome", "reduction_options": "schedule=every_layer,r=12"},
                "blocks 0, 1, 2, 3 would keep 13, 7, 4, 2 with --reduction_options schedule=every_layer,r=12; at",
            ),
        ],
    )
    def test_in_one_line_that_names_the_options(self, values, message):
        with pytest.raises(InputError) as caught:
            validate(small(**values))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value) and not str(caught.value).endswith(".")

    def test_a_method_that_looks_at_cls_where_there_is_none(self):
        with pytest.raises(InputError, match="^--token_reduction evit --keep_rate 0.8: .*CLS"):
            chosen_reducer(make_arguments(token_reduction="evit"), ReductionSetting((3,), num_prefix=0))

    def test_what_comes_to_light_only_when_the_learned_part_is_built(self, monkeypatch):
        def refuse(self):
            raise InputError("crops look alike.")

        monkeypatch.setattr(METHODS["patch_slimming"], "build_learned", refuse)
        with pytest.raises(InputError, match="^--token_reduction patch_slimming --keep_rate 0.8: crops look alike$"):
            validate(small(token_reduction="patch_slimming"))

    def test_the_nearest_size_and_rate_that_would_do_are_named(self):
        values = {"token_reduction": "evit", "reduction_options": "fuse=false", "keep_rate": 0.4}
        with pytest.raises(InputError) as caught:
            validate(small(**values))
        message = str(caught.value)
        assert "--local_crop_size 20 gives 25 patches, of which blocks 1, 2, 3 would keep 10, 4, 2" in message
        remedies = message.split("use ")[1].split(" or more")[0].split(" or ")
        size, rate = (float(remedy.split()[1]) for remedy in remedies)
        assert geometry(small(**(values | {"keep_rate": rate}))).local_counts[-1] == 4
        with pytest.raises(InputError, match="--local_crop_size 20"):
            geometry(small(**(values | {"keep_rate": rate - 0.01})))
        grown = {**SMALL, "local_crop_size": int(size)}
        assert geometry(make_arguments(**grown, **values)).local_counts[-1] >= 4
        grown["local_crop_size"] -= 4
        with pytest.raises(InputError, match="--local_crop_size"):
            geometry(make_arguments(**grown, **values))


def test_help_names_every_method(capsys):
    with pytest.raises(SystemExit), redirect_stdout(io.StringIO()) as shown:
        parse_arguments(["--help"])
    words = set(shown.getvalue().replace(",", " ").replace(".", " ").split())
    assert set(REDUCTIONS) <= words


def test_a_run_goes_on_with_its_own_reduction_options(tmp_path):
    assert {"token_reduction", "reduction_options", "matching", "keep_rate"} <= UNCHANGED_ON_RESUME
    arguments = small(token_reduction="evit", reduction_options="fuse=false")
    identity = loop_settings(arguments, resolve(arguments, 640, 1), tmp_path, "no").identity
    assert identity["--reduction_options"] == "fuse=false"
    assert UNCHANGED_ON_RESUME <= asdict(arguments).keys()


@pytest.mark.parametrize(("name", "offsets"), [("simprune", (0, 12)), ("simprune_dynamic", (0, 32)), ("evit", None)])
def test_the_window_is_logged_where_there_is_one(name, offsets):
    arguments = small(token_reduction=name)
    describe_window = window_description(arguments, resolve(arguments, 640, 1))
    found = [describe_window(tiny_schedules(11).at(step)) for step in (0, 10)]
    if offsets is None:
        assert found == [{}, {}]
    else:  # of 64 tokens 52 are in the window, or half of them
        assert found == [
            {"window_progress": progress, "window_offset": offset} for progress, offset in zip((0, 1), offsets)
        ]


class TestWhatWouldDoNothing:
    def test_a_stream_of_unknown_length_is_refused_before_training_where_a_method_counts_epochs(self):
        arguments = make_arguments(token_reduction="patch_slimming", streaming=True, max_steps=10)
        with pytest.raises(InputError, match="--token_reduction patch_slimming .* without --streaming"):
            resolve(arguments, None, 1)
        resolve(arguments, 640, 1)
        resolve(make_arguments(token_reduction="evit", streaming=True, max_steps=10), None, 1)

    @pytest.mark.parametrize("name", REDUCTIONS)
    def test_a_changed_curriculum_or_matching_is_said_to_do_nothing_where_there_is_none(self, name):
        notes = describe(
            resolve(make_arguments(token_reduction=name, curriculum="hard", matching="symmetric"), 640, 1)
        )
        said = [note for note in notes if "without effect" in note]
        assert len(said) == (0 if name.startswith("simprune") else 2)
        unchanged = describe(resolve(make_arguments(token_reduction=name), 640, 1))
        assert not any("without effect" in note for note in unchanged)
