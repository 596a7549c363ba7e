"""Runs of a comparison: finished ones are left out, interrupted ones go on, one that fails stops no other."""

import json
import signal
import threading
import time

import _comparison_runs as runs
import pytest
import yaml
from _comparison import COMPARISON_OPTIONS, plan_runs, without_place

from hf_simprune.errors import InputError

from .conftest import BENCHMARKS


RECIPE = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
method = sys.argv[sys.argv.index("--token_reduction") + 1]
(folder / "training").mkdir(parents=True, exist_ok=True)
if method == "simprune":
    sys.exit(3)
if method == "random":
    def stop(*_):
        (folder / "checkpoint-1").mkdir()
        sys.exit(130)
    signal.signal(signal.SIGTERM, stop)
    (folder / "started").touch()
    time.sleep(60)
(folder / "training" / "run.json").write_text(json.dumps({"finished": True}))
"""


def plan(folder, *words: str) -> list:
    paths = ["--train", "train.parquet", "--test", "test.parquet", "--output_dir", str(folder)]
    return plan_runs(COMPARISON_OPTIONS.parse([*paths, *words]), False)


def write_state(run, finished: bool, **changes) -> None:
    (run.folder / "training").mkdir(parents=True)
    (run.folder / "training" / "run.json").write_text(json.dumps({"finished": finished}))
    written = without_place(run.args) | {"dataset_name_or_path": "/elsewhere/train.parquet"} | changes
    (run.folder / "training" / "arguments.yaml").write_text(yaml.safe_dump(written))


def test_a_run_begins_goes_on_or_begins_again(tmp_path):
    run = plan(tmp_path)[0]
    assert not {"--resume_from_checkpoint", "--overwrite_output_dir"} & set(runs.start_command(run))
    write_state(run, finished=False)
    assert runs.start_command(run)[-2:] == ["--overwrite_output_dir", "true"]  # it ended before its first checkpoint
    (run.folder / "checkpoint-4").mkdir()
    assert runs.start_command(run)[-2:] == ["--resume_from_checkpoint", "latest"]


def test_a_folder_of_other_settings_is_refused(tmp_path):
    run = plan(tmp_path)[0]
    runs.check_same(run)
    write_state(run, finished=True)
    runs.check_same(run)  # the data may lie elsewhere by now
    assert runs.is_finished(run)
    other = plan(tmp_path, "--options", "learning_rate=1e-3")[0]
    with pytest.raises(InputError, match="none-seed0: trained there with learning_rate 0.0005, now it is 0.001"):
        runs.check_same(other)


def test_what_has_finished_is_left_out_and_a_failure_stops_no_other(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    monkeypatch.setattr(runs, "RECIPE", recipe)
    dense, simprune, evit = plan(tmp_path / "out", "--methods", "none", "simprune", "evit")
    write_state(dense, finished=True)
    failed = runs.train_all([dense, simprune, evit], workers=2)
    assert [run.name for run in failed] == ["simprune-seed0"]
    assert runs.is_finished(evit) and not (tmp_path / "out" / "none-seed0.log").exists()
    assert "FAILED with status 3" in capsys.readouterr().out
    usage = json.loads((tmp_path / "out" / "evit-seed0.usage.jsonl").read_text())
    assert usage["status"] == 0 and usage["peak_bytes"] > 2**20 and usage["cpu_seconds"] > 0


def test_stopping_lets_every_run_save(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    monkeypatch.setattr(runs, "RECIPE", recipe)
    run = plan(tmp_path / "out", "--methods", "none", "random")[1]
    crew = runs._Crew()
    thread = threading.Thread(target=crew.train, args=(run,))
    thread.start()
    for _ in range(300):
        if (run.folder / "started").exists():
            break
        time.sleep(0.1)
    crew.stop()
    thread.join(timeout=60)
    assert not thread.is_alive() and (run.folder / "checkpoint-1").is_dir()
    assert not crew.train(run)  # nothing is started any more


def test_speed_is_the_median_after_the_first_log(tmp_path):
    run = plan(tmp_path)[0]
    run.folder.mkdir(parents=True)
    speeds = [1.0, 10.0, 30.0, 20.0]
    lines = [{"step": 0, "knn_accuracy": 0.1}, *({"step": i, "images_per_second": s} for i, s in enumerate(speeds))]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    usage = [{"peak_bytes": peak, "cpu_seconds": 2.0, "wall_seconds": 3.0, "device": "cpu"} for peak in (7, 5)]
    (tmp_path / f"{run.name}.usage.jsonl").write_text("".join(json.dumps(line) + "\n" for line in usage))
    found = runs.measured(run)
    assert (found["images_per_second"], found["peak_bytes"], found["cpu_seconds"], found["starts"]) == (20.0, 7, 4, 2)
    (tmp_path / f"{run.name}.usage.jsonl").unlink()
    assert runs.measured(run) == {"images_per_second": 20.0, "peak_bytes": None}, "trained outside of the comparison"


def test_flop_share_is_counted_for_the_methods_own_tokens(tmp_path):
    dense, random = plan(tmp_path, "--methods", "none", "random")
    assert runs.flop_share(dense) == 1.0
    (random.folder / "training" / "initial").mkdir(parents=True)
    config = {"model_type": "vit", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config |= {"intermediate_size": 512, "patch_size": 8, "image_size": 32}
    (random.folder / "training" / "initial" / "config.json").write_text(json.dumps(config))
    (random.folder / "training" / "run.json").write_text(json.dumps({"settings": {"out_dim": 1024}}))
    assert 0.8 < runs.flop_share(random) < 0.95


def test_bad_input_ends_with_one_line_and_status_two(tmp_path, monkeypatch, capsys):
    import compare_reduction

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    settings = ["--config", str(BENCHMARKS / "cifar10_micro.yaml"), "--output_dir", str(tmp_path / "out")]
    assert compare_reduction.main(settings) == 2
    assert capsys.readouterr().err.startswith("error: --train and --test are required")
    assert compare_reduction.main([*settings, "--methods", "none", "evti", "--train", "a", "--test", "b"]) == 2
    error = capsys.readouterr().err
    assert "evti is unknown" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
