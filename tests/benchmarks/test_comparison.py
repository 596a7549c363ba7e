"""What the comparison of reductions plans, and what it makes of the results."""

import _comparison
import _comparison_table as table
import numpy as np
import pytest

from hf_simprune.dino.argument_parsing import read_config
from hf_simprune.errors import InputError

from .conftest import BENCHMARKS


CONFIGS = sorted(BENCHMARKS.glob("*.yaml"))


def plan(*words: str, gpu: bool = False, paths: bool = True) -> list[_comparison.Run]:
    files = ["--train", "train.parquet", "--test", "test.parquet"] if paths else []
    return _comparison.plan_runs(_comparison.COMPARISON_OPTIONS.parse([*files, *words]), gpu)


def test_variants_are_all_combinations_with_dense_first():
    found = _comparison.parse_variants(["random", "simprune:curriculum=easy|hard,keep_rate=0.9|0.8", "none"])
    assert [variant.label for variant in found] == [
        "none",
        "random",
        "simprune:curriculum=easy,keep_rate=0.9",
        "simprune:curriculum=easy,keep_rate=0.8",
        "simprune:curriculum=hard,keep_rate=0.9",
        "simprune:curriculum=hard,keep_rate=0.8",
    ]
    assert len({variant.folder for variant in found}) == 6


def test_options_of_the_method_and_of_the_training_find_their_place():
    run = plan("--methods", "none", "tome:proportional=false,keep_rate=0.8", "--seeds", "3")[1]
    assert run.args.token_reduction == "tome" and run.args.keep_rate == 0.8 and run.args.seed == 3
    assert run.args.reduction_options == "proportional=false"
    symmetric = plan("--methods", "none", "simprune:matching=symmetric")[1]
    assert symmetric.args.matching == "symmetric" and symmetric.args.reduction_options is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_settings_files_can_be_run(path):
    runs = plan("--config", str(path), gpu=True)
    assert runs[0].variant.label == "none"
    assert len({run.folder for run in runs}) == len(runs)


def test_cifar10_micro_trains_as_its_recipe_says():
    recipe = read_config(BENCHMARKS.parent / "recipes" / "cifar10_vit_micro.yaml")
    runs = plan("--config", str(BENCHMARKS / "cifar10_micro.yaml"))
    assert [run.variant.label for run in runs] == ["none", "random", "simprune", "evit", "tome"]
    for run in runs:
        for name, value in recipe.items():
            if name not in ("output_dir", "token_reduction"):
                assert getattr(run.args, name) == value, name


def test_runs_of_a_seed_differ_in_the_reduction_alone():
    runs = plan("--methods", "none", "random", "simprune", "--seeds", "0", "1", "--options", "max_steps=7")
    assert [(run.variant.label, run.seed) for run in runs[:4]] == [
        ("none", 0),
        ("random", 0),
        ("simprune", 0),
        ("none", 1),
    ]
    first = _comparison.without_place(runs[0].args)
    for run in runs[1:3]:
        other = _comparison.without_place(run.args)
        assert {name for name in first if first[name] != other[name]} == {"token_reduction"}
    assert all(run.args.max_steps == 7 for run in runs)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--metods", "none"], "unknown option --metods; did you mean --methods"),
        (["--methods", "none", "simprun"], "simprun is unknown"),
        (["--methods", "simprune"], "none, the dense run|none must be among"),
        (["--methods", "none", "random", "random"], "random is named twice"),
        (["--methods", "none", "simprune:curiculum=easy"], "curiculum is no option"),
        (["--methods", "none", "simprune:curriculum=eazy"], "curriculum eazy"),
        (["--methods", "none", "simprune:color_jitter=1"], "color_jitter is no option"),
        (["--methods", "none", "simprune:seed=1"], "seed is no option"),
        (["--methods", "none", "random:keep_rate"], "not of the form name=value"),
        (["--methods", "none", "random:keep_rate=7"], "keep_rate 7"),
        (["--methods", "none", "random:keep_rate=0.3"], "random:keep_rate=0.3: .*at least 4 must stay"),
        (["--seeds", "1", "1"], "each seed once"),
        (["--workers", "0"], "workers 0"),
        (["--options", "max_step=5"], "unknown option --max_step"),
        (["--options", "seed=5"], "seed=5"),
        (["--recipe", "nowhere.yaml"], "recipe nowhere.yaml: there is no such file"),
    ],
)
def test_a_typo_is_an_error_before_anything_runs(words, complaint):
    with pytest.raises(InputError, match=complaint):
        plan(*words)


def test_a_typo_in_the_settings_file_is_an_error(tmp_path):
    (tmp_path / "settings.yaml").write_text("seed: [0]\n")
    with pytest.raises(InputError, match="unknown option seed; did you mean seeds"):
        plan("--config", str(tmp_path / "settings.yaml"))
    with pytest.raises(InputError, match="--train and --test are required"):
        plan(paths=False)


def test_a_gpu_compares_all_methods_with_three_seeds():
    runs = plan("--options", "patch_size=4", gpu=True)
    assert {run.variant.method for run in runs} == {"none", *_comparison.METHODS}
    assert {run.seed for run in runs} == {0, 1, 2}


def hits(*accuracies: float, images: int = 400, seed: int = 0) -> np.ndarray:
    """(seeds, images) booleans of about these accuracies; images that are easy are so for all."""
    difficulty = np.random.default_rng(0).random(images)
    noise = np.random.default_rng(seed + 1).normal(0, 0.05, (len(accuracies), images))
    return difficulty + noise < np.array(accuracies)[:, None]


def row(label: str, seeds: tuple[int, ...], *accuracies: float, **more: float) -> table.Row:
    return table.Row(label, seeds, {"knn": hits(*accuracies, seed=len(label))}, **more)


def test_accuracy_is_the_mean_and_spread_over_seeds():
    values = hits(0.5, 0.6, 0.7)
    mean, deviation = table.accuracy(values)
    by_seed = [100 * sum(map(bool, seed)) / 400 for seed in values]
    assert mean == pytest.approx(sum(by_seed) / 3)
    assert deviation == pytest.approx((sum((v - mean) ** 2 for v in by_seed) / 2) ** 0.5)
    assert table.accuracy(values[:1])[1] is None


@pytest.mark.parametrize(
    ("dense", "random", "pixels", "passed"),
    [(0.5, 0.4, 0.47, True), (0.5, 0.41, 0.3, False), (0.5, 0.3, 0.48, False)],
)
def test_the_gate_asks_ten_points_over_random_and_three_over_pixels(dense, random, pixels, passed):
    sides = [(np.arange(100) < round(100 * share))[None] for share in (dense, random, pixels)]
    found, words = table.gate(*sides)
    assert found is passed and ("NOT passed" in words) is not passed


def test_retained_gain_agrees_with_drawing_the_images_again():
    x, random, dense = hits(0.55, 0.57, seed=1), hits(0.3, 0.32, seed=2), hits(0.6, 0.62, seed=3)
    found = table.retained_gain(x, random, dense)
    gains = []
    for draw in np.random.default_rng(5).integers(400, size=(3000, 400)):
        means = [values[:, draw].mean() for values in (x, random, dense)]
        gains.append((means[0] - means[1]) / (means[2] - means[1]))
    low, high = np.percentile(gains, [2.5, 97.5])
    assert found.value == pytest.approx((x.mean() - random.mean()) / (dense.mean() - random.mean()))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert table.retained_gain(dense, random, dense) == (1.0, 1.0, 1.0)


def rows(dense: float = 0.6) -> list[table.Row]:
    return [
        row(table.PIXELS, (), 0.35),
        row(table.RANDOM_NETWORK, (0, 1), 0.3, 0.32),
        row(table.DENSE, (0, 1), dense, dense + 0.02, flop_share=1.0, time_share=1.0, peak_bytes=2**29),
        row("simprune", (1,), 0.58, flop_share=0.75, time_share=0.8, peak_bytes=2**28),
    ]


def test_only_seeds_that_both_have_are_compared():
    made = rows()
    found = table.compare(made, "knn")["difference"]["simprune"]
    expected = 100 * (made[3].hits["knn"][0].mean() - made[2].hits["knn"][1].mean())
    assert found.value == pytest.approx(expected)


def test_without_passing_the_gate_no_gain_is_reported():
    found = table.compare(rows(dense=0.36), "knn")
    assert not found["passed"] and not found["gain"]
    text = table.markdown(rows(dense=0.36), {"knn": found}, {"knn": "k-NN"}, ["a note"])
    assert "NOT passed" in text and "retained gain" not in text
    passed = table.markdown(rows(), {"knn": table.compare(rows(), "knn")}, {"knn": "k-NN"}, [])
    assert "retained gain" in passed


def test_the_table_shows_what_was_measured(tmp_path):
    text = table.markdown(rows(), {"knn": table.compare(rows(), "knn")}, {"knn": "k-NN"}, ["one note"])
    lines = text.splitlines()
    assert "- one note" in lines
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines if "|" in line}
    mean, deviation = table.accuracy(rows()[2].hits["knn"])
    assert cells["dense"] == ["0 1", f"{mean:.2f} ± {deviation:.2f}", "100.0 %", "100.0 %", "512 MiB"]
    assert cells["raw pixels"][2:] == ["–", "–", "–"]
    table.draw(rows(), {"knn": "k-NN"}, tmp_path / "comparison.png", "title")
    from PIL import Image

    assert Image.open(tmp_path / "comparison.png").size[0] > 500
