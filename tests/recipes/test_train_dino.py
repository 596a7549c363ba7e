"""`recipes/train_dino.py` as it is typed: Ctrl-C, launchers, several processes, the Hub."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from ..hub.loopback import LoopbackHub
from ..tiny_run import OPTIONS, RECIPE, command, environment, losses, untimed, words, write_images
from .test_train_dino_bad_input import load_recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images.parquet")


@pytest.fixture
def recipe(monkeypatch, capsys):
    """Runs the recipe in this process; returns its status and what it wrote to stdout and stderr."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("hf_simprune.dino.run.draw_pictures", lambda *_: None)

    def run(**options):
        AcceleratorState._reset_state(True)
        status = load_recipe().main(words(**options))
        return (status, *capsys.readouterr())

    yield run
    AcceleratorState._reset_state(True)


def wait_for_lines(process: subprocess.Popen, file: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_text().count("\n") >= count):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def test_ctrl_c_saves_says_how_to_resume_and_resuming_changes_nothing(recipe, images, tmp_path):
    options = {"dataset_name_or_path": images, "max_steps": 40, "save_steps": 100, "dataloader_num_workers": 2}
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    interrupted = subprocess.Popen(
        command(output_dir=parts, **options),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_lines(interrupted, parts / "metrics.jsonl", 4)
    os.killpg(interrupted.pid, signal.SIGINT)  # as a terminal does: to the loader's processes too
    _, err = interrupted.communicate(timeout=120)
    assert interrupted.returncode == 130
    assert "Traceback" not in err
    (message,) = [line for line in err.splitlines() if line.startswith("interrupted after step")]
    assert "--resume_from_checkpoint latest" in message
    step = int(re.search(r"after step (\d+)", message)[1])
    assert 3 <= step < 40 and (parts / f"checkpoint-{step}" / "trainer_state.json").exists()

    status, out, _ = recipe(output_dir=parts, resume_from_checkpoint="latest", **options)
    assert status == 0 and f"resumed from {parts}/checkpoint-{step} at step {step}" in out
    assert recipe(output_dir=whole, **options)[0] == 0
    assert len(losses(whole)) == 40
    assert untimed(parts) == untimed(whole)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_ctrl_c_before_training_is_one_line_too(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_simprune.dino.run.run_training", lambda args: os.kill(os.getpid(), signal.SIGINT))
    assert load_recipe().main(words(output_dir=tmp_path / "run", dataset_name_or_path=images)) == 130
    assert capsys.readouterr().err.startswith("interrupted; ")


def test_accelerate_launch_with_a_settings_file(images, tmp_path):
    settings = {**OPTIONS, "dataset_name_or_path": images, "output_dir": str(tmp_path / "run"), "max_steps": 9}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--mixed_precision", "bf16"]
    result = subprocess.run(
        [*launch, str(RECIPE), "--config", str(tmp_path / "run.yaml"), "--max-steps", "2"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "attention: eager" in result.stdout  # as bf16 on the CPU has it, so accelerate's precision arrived
    assert len(losses(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "model.safetensors").exists()


TWO_PROCESSES = """
    import importlib.util, os, signal, sys
    from accelerate.state import AcceleratorState
    from hf_simprune.dino import run
    from hf_simprune.dino.online_knn import OnlineKnn
    run.draw_pictures = lambda *_: None
    spec = importlib.util.spec_from_file_location("train_dino", sys.argv[1])
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    rank, ports = os.environ["RANK"], os.environ["PORTS"].split()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # the launcher's own serves one group only
    evaluate = OnlineKnn.__call__

    def interrupted(self, step, stopped):
        if step == 2 and rank == "1":
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, step, stopped)

    for reduction, port in zip(("none", "simprune", "self_slimmed", "interrupted"), ports, strict=True):
        os.environ["MASTER_PORT"] = port
        words = ["--output_dir", f"{sys.argv[2]}/{reduction}", *sys.argv[3:]]
        if reduction == "interrupted":
            OnlineKnn.__call__ = interrupted
        else:
            words += ["--token_reduction", reduction]
        status = recipe.main(words)
        print(f"status of rank {rank}, {reduction}: {status}", flush=True)
        AcceleratorState._reset_state(True)
        if reduction != "interrupted":
            assert recipe.main(words) == 2  # refused in both, said by one
            AcceleratorState._reset_state(True)
"""


def free_ports(count: int) -> list[str]:
    """Ports that nothing listens on at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [str(opened.getsockname()[1]) for opened in sockets]


def test_two_processes_equal_one_with_twice_the_batch(recipe, images, tmp_path):
    options = {"dataset_name_or_path": images, "drop_path_rate": 0, "max_steps": 3, "warmup_steps": 0, "knn_every": 2}
    (tmp_path / "driver.py").write_text(textwrap.dedent(TWO_PROCESSES))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    result = subprocess.run(
        [
            *launch,
            str(tmp_path / "driver.py"),
            str(RECIPE),
            str(tmp_path / "two"),
            *words(per_device_train_batch_size=4, **options),
        ],
        env=environment(PORTS=" ".join(free_ports(4))),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    print(result.stdout, result.stderr)
    assert result.stdout.count("global batch 8 on 2 processes, 3 steps, 5 an epoch") == 4
    assert result.stdout.count("holds the model, its card and pictures") == 3
    assert result.stderr.count("already holds a run") == 3
    for reduction in ("none", "simprune", "self_slimmed"):  # the last one learns, and not at every stage
        for rank in (0, 1):
            assert f"status of rank {rank}, {reduction}: 0" in result.stdout
        one = tmp_path / "one" / reduction
        assert recipe(output_dir=one, token_reduction=reduction, **options)[0] == 0
        assert losses(tmp_path / "two" / reduction) == pytest.approx(losses(one), rel=1e-5)
        centers = [
            load_file(f / "checkpoint-3" / "optimizer.safetensors")["center"]
            for f in (tmp_path / "two" / reduction, one)
        ]
        assert torch.allclose(*centers, rtol=1e-3, atol=1e-5)
        assert [r["step"] for r in untimed(tmp_path / "two" / reduction)] == [r["step"] for r in untimed(one)]

    # a Ctrl-C that one process hears stops both after the same step
    assert all(f"status of rank {rank}, interrupted: 130" in result.stdout for rank in (0, 1))
    assert result.stderr.count("interrupted after step 2") == 1
    state = json.loads((tmp_path / "two" / "interrupted" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["step"] == 2


def test_processes_that_would_not_know_of_each_other_are_refused(recipe, images, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("hf_simprune.dino.run.PartialState", lambda **_: AloneState())
    status, _, err = recipe(output_dir=tmp_path / "run", dataset_name_or_path=images)
    assert status == 2 and err.startswith("error: 2 processes were launched") and "ACCELERATE_USE_CPU=true" in err
    assert not (tmp_path / "run").exists()


class AloneState:
    num_processes = 1
    device = torch.device("cpu")


def test_a_run_is_pushed_to_the_hub_and_loads_from_there(images, tmp_path):
    code = """
        import importlib.util, sys, torch
        spec = importlib.util.spec_from_file_location("train_dino", sys.argv[1])
        recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)
        folder = sys.argv[2]
        status = recipe.main(["--output_dir", folder, *sys.argv[3:]])
        from transformers import AutoImageProcessor, AutoModel
        model, info = AutoModel.from_pretrained("tester/tiny-dino", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for name, value in AutoModel.from_pretrained(folder).state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        AutoImageProcessor.from_pretrained("tester/tiny-dino")
        print("status", status)
    """
    options = {"dataset_name_or_path": images, "max_steps": 2, "hub_model_id": "tiny-dino"}
    process = {name: environment()[name] for name in ("PYTHONPATH", "ACCELERATE_USE_CPU", "OMP_NUM_THREADS")}
    with LoopbackHub() as hub:
        result = subprocess.run(
            [
                *(sys.executable, "-c", textwrap.dedent(code), str(RECIPE), str(tmp_path / "run")),
                *words(**options),
                *("--push_to_hub", "--hub_private_repo", "--hub_strategy", "every_save"),
            ],
            env={**hub.environment(tmp_path / "home"), **process},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "status 0" in result.stdout, result.stdout + result.stderr
        assert "uploaded to tester/tiny-dino" in result.stdout
        files = hub.repos["tester/tiny-dino"]
        assert "tester/tiny-dino" in hub.private
        assert len(hub.commits["tester/tiny-dino"]) == 3  # made, step 2, the end
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "metrics.jsonl"} <= set(files)
    assert not any(name.startswith("checkpoint") for name in files)
    card = files["README.md"].decode()
    assert 'from_pretrained("tester/tiny-dino")' in card and "hf_test" not in card


def test_a_corrupt_image_stops_the_run_if_asked_to(recipe, tmp_path):
    data = write_images(tmp_path / "broken.parquet", broken=[17])
    for workers in (0, 2):
        status, _, err = recipe(
            output_dir=tmp_path / f"run{workers}",
            dataset_name_or_path=data,
            on_bad_image="error",
            dataloader_num_workers=workers,
        )
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        assert status == 1
        assert len(errors) == 1 and re.match(r"error: stopped at step \d: image 17 cannot be read", errors[0])
        assert "Traceback" not in err


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(recipe, images, tmp_path):
    status, _, err = recipe(output_dir=tmp_path / "run", dataset_name_or_path=images, learning_rate=1e30)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert status == 1 and len(errors) == 1 and "Traceback" not in err
    step = int(re.match(r"error: stopped at step (\d+): loss is (nan|inf)", errors[0])[1])
    assert (tmp_path / "run" / f"checkpoint-{step}" / "student.safetensors").exists()


def test_local_crops_that_do_not_fall_into_patches_are_refused(recipe, images, tmp_path):
    status, _, err = recipe(output_dir=tmp_path / "run", dataset_name_or_path=images, local_crop_size=10)
    assert status == 2
    assert err == "error: --local_crop_size 10 is no multiple of the patch size 4: use 8 or 12\n"
