"""Options of analyze and compress, before a model or images are opened."""

from dataclasses import fields
from pathlib import Path

import pytest

from hf_simprune.dino.arguments import DinoArguments
from hf_simprune.errors import InputError
from hf_simprune.rba.arguments import (
    ANALYZE_OPTIONS,
    COMPRESS_OPTIONS,
    CompressArguments,
    parse_limit,
    validate_analysis,
    validate_compression,
)
from hf_simprune.rba.plan import CompressionPlan, Span


REQUIRED = ["model", "--dataset", "data", "--output", "out"]
RECIPES = Path(__file__).parents[2] / "recipes"


def compress(*words: str) -> CompressArguments:
    args = COMPRESS_OPTIONS.parse([*REQUIRED, *words])
    validate_compression(args)
    return args


def test_the_command_of_the_readme():
    args = compress("--remove-blocks", "3", "--map", "fold")
    found = (args.model_name_or_path, args.dataset_name_or_path, args.output_dir, args.remove_blocks, args.map)
    assert found == ("model", "data", "out", 3, ["fold"])
    assert (args.calibration_images, args.cost_images, args.max_span, args.granularity) == (500, 64, 6, "block")


def test_analyze_needs_no_budget():
    args = ANALYZE_OPTIONS.parse([*REQUIRED, "--granularity", "half"])
    validate_analysis(args)
    assert args.granularity == "half"


def test_options_of_both_recipes_are_the_same():
    ours, theirs = ({option.name: option for option in fields(kind)} for kind in (CompressArguments, DinoArguments))
    shared = set(ours) & set(theirs)
    assert shared >= {
        "dataset_name_or_path", "dataset_config_name", "dataset_revision", "eval_split", "image_column",
        "label_column", "token", "model_name_or_path", "model_revision", "output_dir", "overwrite_output_dir",
        "push_to_hub", "hub_model_id", "hub_private_repo", "seed",
    }  # fmt: skip
    assert all(ours[name].type == theirs[name].type and ours[name].default == theirs[name].default for name in shared)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no budget: give exactly one of --remove_blocks, --max_params"),
        (["--remove_blocks", "2", "--max_cost", "1"], "--remove_blocks and --max_cost exclude each other"),
        (["--remove_blocks", "0"], "--remove_blocks 0: must be 1 or more"),
        (["--max_params", "1.2x"], "--max_params 1.2x: a share must be below 1x"),
        (["--max_flops", "lots"], "--max_flops lots: give a number above 0, or a share of the original such as 0.8x"),
        (["--max_latency", "-3"], "--max_latency -3: give a number above 0"),
        (["--max_latency", "80%"], "--max_latency 80%: give a number above 0"),
        (["--max_cost", "nan"], "--max_cost nan: must be a finite number"),
        (["--max_cost", "-1"], "--max_cost -1: must be above 0"),
        (["--remove_blocks", "1", "--map", "folds"], "--map folds is unknown: choose from fold, linear"),
        (["--remove_blocks", "1", "--map", "fold", "fold"], "--map fold fold: name each kind once"),
        (["--remove_blocks", "1", "--rank", "4"], "--rank 4 is for low_rank maps"),
        (["--remove_blocks", "1", "--map", "low_rank", "--rank", "0"], "--rank 0: must be 1 or more"),
        (["--remove_blocks", "1", "--granularity", "quarter"], "--granularity quarter is unknown"),
        (["--remove_blocks", "1", "--strategy", "br"], "--strategy br is unknown: choose one of measured, br-con"),
        (["--max_flops", "0.8x", "--strategy", "br-greedy"], "--strategy br-greedy removes a number of blocks"),
        (["--remove_blocks", "1", "--strategy", "br-greedy", "--granularity", "half"], "takes one --map"),
        (["--remove_blocks", "1", "--ridge", "-1"], "--ridge -1: must be 0 or more"),
        (["--remove_blocks", "1", "--cost_images", "0"], "--cost_images 0: must be 1 or more"),
        (["--remove_blocks", "1", "--max_span", "0"], "--max_span 0: must be 1 or more"),
        (["--remove_blocks", "1", "--heal_steps", "-1"], "--heal_steps -1: must be 0 or more"),
        (["--remove_blocks", "1", "--eval_split", "train"], "--eval_split train is the calibration split too"),
        (["--plan", "nowhere.json"], "--plan nowhere.json: there is no such file"),
    ],
)
def test_mistakes_are_one_line_that_names_the_option(words, message):
    with pytest.raises(InputError) as caught:
        compress(*words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_plan_file_is_read_before_anything_else(tmp_path):
    CompressionPlan(6, (Span(2, 3),)).save(tmp_path / "plan.json")
    compress("--plan", str(tmp_path / "plan.json"))
    with pytest.raises(InputError, match="exclude each other"):
        compress("--plan", str(tmp_path / "plan.json"), "--remove_blocks", "1")
    (tmp_path / "bad.json").write_text('{"depth": 6, "spans": [{"start": 2, "end": 3}, {"start": 3, "end": 4}]}')
    with pytest.raises(InputError, match="adjacent"):
        compress("--plan", str(tmp_path / "bad.json"))


@pytest.mark.parametrize(("text", "expected"), [("0.8x", 80.0), (".5x", 50.0), ("30", 30.0), ("2.5e1", 25.0)])
def test_limits_are_shares_or_amounts(text, expected):
    assert parse_limit("max_params", text).remaining(100.0) == pytest.approx(expected)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("compress*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid(recipe):
    validate_compression(COMPRESS_OPTIONS.parse(["--config", str(recipe), "--dataset", "data"]))


@pytest.mark.parametrize(
    "words",
    [
        ["--eval_dataset_name_or_path", "data"],
        ["--eval_dataset_name_or_path", "./data"],
        ["--eval_split", "train[:20%]"],
        ["--eval_split", "test+train"],
        ["--calibration_split", "train[:80%]", "--eval_split", "train"],
        ["--calibration_split", "train[:80%]", "--eval_split", "train[:80%]"],
    ],
    ids=" ".join,
)
def test_images_that_were_calibrated_on_are_not_evaluated_on(words, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is the calibration split too"):
        compress("--remove_blocks", "1", *words)


@pytest.mark.parametrize(
    "words",
    [
        ["--eval_dataset_name_or_path", "other"],
        ["--eval_split", "test"],
        ["--eval_dataset_name_or_path", "data", "--eval_split", "test"],
        ["--calibration_split", "train[:80%]", "--eval_split", "train[80%:]"],
    ],
    ids=" ".join,
)
def test_other_images_may_be_evaluated_on(words):
    compress("--remove_blocks", "1", *words)
