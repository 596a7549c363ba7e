"""Options from YAML and the command line to one dataclass."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
from transformers import TrainingArguments

from hf_simprune.dino.argument_parsing import parse_arguments, read_config
from hf_simprune.dino.arguments import ARGUMENT_GROUPS, DinoArguments
from hf_simprune.dino.validation import validate
from hf_simprune.errors import InputError

from .make_arguments import make_arguments


REQUIRED = ("--output_dir", "out", "--dataset_name_or_path", "data")
RECIPES = Path(__file__).parents[2] / "recipes"
TRAINING_RECIPES = sorted(set(RECIPES.glob("*.yaml")) - set(RECIPES.glob("compress*.yaml")))


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


class TestCommandLine:
    def test_defaults_are_those_of_the_dataclass(self):
        assert parse_arguments(REQUIRED) == make_arguments()

    def test_every_option_is_accepted_with_underscores_and_with_hyphens(self):
        samples = {bool: "true", int: "7", float: "0.5", str: "word", list[int]: "7", list[float]: "0.5"}
        parsed = {bool: True, int: 7, float: 0.5, str: "word", list[int]: [7], list[float]: [0.5]}
        hints = {}
        for group in ARGUMENT_GROUPS:
            hints.update(group.__annotations__)
        hints.pop("_argument_group_name", None)
        assert set(hints) == {option.name for option in fields(DinoArguments)}
        for name, hint in hints.items():
            kind = next(known for known in samples if hint in (known, known | None))
            for spelling in (name, name.replace("_", "-")):
                found = parse_arguments([*REQUIRED, f"--{spelling}", samples[kind]])
                assert vars(found)[name] == parsed[kind], spelling
                assert replace(found, **{name: vars(make_arguments())[name]}) == make_arguments()

    def test_every_option_is_described(self):
        assert all(option.metadata["help"] for option in fields(DinoArguments))

    def test_names_shared_with_training_arguments_have_its_types(self):
        ours = {option.name: option for option in fields(make_arguments())}
        shared = [option for option in fields(TrainingArguments) if option.name in ours]
        assert len(shared) > 25
        for option in shared:
            theirs = option.default
            if type(theirs) in (bool, int, float) and ours[option.name].default is not None:
                assert isinstance(theirs, type(ours[option.name].default)), option.name

    def test_lists_take_several_values(self):
        parsed = parse_arguments([*REQUIRED, "--reduction_layers", "3", "6", "9", "--global-crops-scale", ".3", "1"])
        assert parsed.reduction_layers == [3, 6, 9]
        assert parsed.global_crops_scale == [0.3, 1.0]

    @pytest.mark.parametrize(
        ("words", "expected"),
        [((), False), (("--bf16",), True), (("--bf16", "False"), False), (("--bf16=true",), True)],
    )
    def test_switches_work_as_in_training_arguments(self, words, expected):
        assert parse_arguments([*REQUIRED, *words]).bf16 is expected

    @pytest.mark.parametrize("word", ["--no_norm_last_layer", "--no-norm-last-layer"])
    def test_a_switch_that_is_on_can_be_turned_off(self, word):
        assert parse_arguments(REQUIRED).norm_last_layer is True
        assert parse_arguments([*REQUIRED, word]).norm_last_layer is False

    def test_hyphens_in_values_stay(self):
        assert parse_arguments([*REQUIRED, "--run-name=a-b_c"]).run_name == "a-b_c"

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--keeprate", "0.7"], "unknown option --keeprate; did you mean --keep_rate?"),
            (["--keep-rte=0.7"], "unknown option --keep_rte; did you mean --keep_rate?"),
            (["--zzz"], "unknown option --zzz; run with --help for the list"),
            (["--keep"], "unknown option --keep"),  # no abbreviations
            (["stray"], "'stray' belongs to no option"),
            (["--keep_rate", "high"], "--keep_rate: invalid float value: 'high'"),
            (["--seed", "1.5"], "--seed: invalid int value: '1.5'"),
            (["--learning_rate", "fast"], "--learning_rate: invalid float value: 'fast'"),
            (["--bf16", "perhaps"], "--bf16"),
            (["--reduction_layers"], "--reduction_layers: expected at least one argument"),
            (["--reduction_layers", "3", "none"], "--reduction_layers: none cannot stand beside other values"),
            (["--config"], "--config: expected one argument"),
            (["--config", "nowhere.yaml"], "--config nowhere.yaml: No such file or directory"),
        ],
    )
    def test_mistakes_are_one_line_that_names_the_option(self, words, message):
        with pytest.raises(InputError) as caught:
            parse_arguments([*REQUIRED, *words])
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("missing", ["--output_dir", "--dataset_name_or_path"])
    def test_a_missing_required_option_is_named(self, missing):
        position = REQUIRED.index(missing)
        with pytest.raises(InputError, match=f"^{missing} is required"):
            parse_arguments(REQUIRED[:position] + REQUIRED[position + 2 :])

    def test_help_shows_the_groups_and_ends_well(self, capsys):
        with pytest.raises(SystemExit) as caught:
            parse_arguments(["--help", "--config", "nowhere.yaml"])
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        assert all(f"\n{group._argument_group_name}:" in shown for group in ARGUMENT_GROUPS)
        assert "--keep_rate" in shown
        assert "(default: 0.8)" in shown
        assert "default: None" not in shown


class TestYaml:
    def test_file_gives_values_and_the_command_line_wins(self, tmp_path):
        text = "output_dir: out\ndataset-name-or-path: data\nkeep_rate: 0.5\nbf16: true\nreduction_layers: [1, 2]\n"
        config = write(tmp_path / "run.yaml", text)
        assert parse_arguments(["--config", config]) == make_arguments(
            keep_rate=0.5, bf16=True, reduction_layers=[1, 2]
        )
        changed = parse_arguments(
            ["--keep-rate", "0.9", "--config", config, "--bf16", "no", "--reduction_layers", "4"]
        )
        assert changed == make_arguments(keep_rate=0.9, bf16=False, reduction_layers=[4])

    def test_none_on_the_command_line_takes_a_value_back(self, tmp_path):
        config = write(tmp_path / "run.yaml", "base_learning_rate: 1.0e-3\nreduction_layers: [1]\nrun_name: a\n")
        words = [
            "--config",
            config,
            "--base_learning_rate",
            "none",
            "--reduction-layers",
            "None",
            "--run_name",
            "null",
        ]
        assert parse_arguments([*REQUIRED, *words]) == make_arguments()

    def test_numbers_that_yaml_reads_as_text_are_numbers(self, tmp_path):
        text = "learning_rate: 5e-4\nmin_learning_rate: 1e-6\nweight_decay: 1\nblur_prob: [1, 1e-1, 0.5]\n"
        values = read_config(Path(write(tmp_path / "run.yaml", text)))
        expected = {
            "learning_rate": 5e-4,
            "min_learning_rate": 1e-6,
            "weight_decay": 1.0,
            "blur_prob": [1.0, 0.1, 0.5],
        }
        assert values == expected
        assert all(type(values[name]) is type(expected[name]) for name in expected)

    def test_null_leaves_an_option_open(self, tmp_path):
        assert read_config(Path(write(tmp_path / "run.yaml", "learning_rate: null\n"))) == {"learning_rate": None}

    def test_empty_file_changes_nothing(self, tmp_path):
        assert read_config(Path(write(tmp_path / "run.yaml", "# nothing yet\n"))) == {}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("keeprate: 0.7", "unknown option keeprate; did you mean keep_rate?"),
            ("config: other.yaml", "unknown option config"),
            ("keep_rate: high", "keep_rate: expected a number, got 'high'"),
            ("keep_rate: true", "keep_rate: expected a number, got True"),
            ("keep_rate: null", "keep_rate: expected a number, got None"),
            ("keep_rate: [0.7]", "keep_rate: expected a number, got [0.7]"),
            ("seed: 1.5", "seed: expected a whole number, got 1.5"),
            ("seed: '1'", "seed: expected a whole number, got '1'"),
            ("seed: true", "seed: expected a whole number, got True"),
            ("bf16: 1", "bf16: expected true or false, got 1"),
            ("bf16: 'true'", "bf16: expected true or false, got 'true'"),
            ("run_name: 2024", "run_name: expected text (put it in quotes), got 2024"),
            ("report_to: no", "report_to: expected text (put it in quotes), got False"),
            ("reduction_layers: 3", "reduction_layers: expected a list, each entry a whole number, got 3"),
            ("reduction_layers: [3, a]", "reduction_layers: expected a whole number, got 'a'"),
            ("keep_rate: 0.7\nkeep_rate: 0.8", "keep_rate is given twice"),
            ("keep_rate: 0.7\nkeep-rate: 0.8", "keep_rate is given twice"),
            ("- keep_rate", "expected lines of `option: value`, found a list"),
            ("keep_rate: [", "not valid YAML"),
        ],
    )
    def test_mistakes_are_one_line_that_names_file_and_option(self, tmp_path, text, message):
        config = write(tmp_path / "run.yaml", text)
        with pytest.raises(InputError) as caught:
            parse_arguments([*REQUIRED, "--config", config])
        assert str(caught.value).startswith(f"--config {config}: ")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("recipe", TRAINING_RECIPES, ids=lambda path: path.stem)
    def test_recipes_are_valid(self, recipe):
        validate(parse_arguments(["--config", str(recipe), "--dataset_name_or_path", "data"]))
