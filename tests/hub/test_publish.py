# SPDX-License-Identifier: Apache-2.0
"""A run's folder goes to a hub on this machine and comes back bit-equal; what is wrong is said in one line."""

import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import ViTConfig, ViTModel

from hf_simprune.evaluation.features import build_image_processor

from .loopback_hub import LoopbackHub


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as server:
        yield server


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """An output folder as a run leaves it, with a checkpoint and an unfinished one beside the model."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
    )
    ViTModel(config).save_pretrained(folder)
    build_image_processor(16, [0.5] * 3, [0.5] * 3).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# a card of our own\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (folder / "loss_curve.png").write_bytes(b"not really a picture")
    for name in ("training", "checkpoint-10", ".checkpoint-20.partial"):
        (folder / name).mkdir()
        (folder / name / "student.safetensors").write_bytes(name.encode())
    return folder


def client(hub, home, code, *arguments, token="hf_test", **environment):
    """Run `code` in a process that talks to the hub."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=hub.environment(home, token) | environment,
        capture_output=True,
        text=True,
        timeout=180,
    )


PUSH = """
    import sys
    from hf_simprune.errors import InputError
    from hf_simprune.hub.publish import UploadError, create_repo_early, upload_run
    try:
        repo_id = create_repo_early(sys.argv[1], private="private" in sys.argv)
        print("repo", repo_id)
        if "upload" in sys.argv:
            result = upload_run(sys.argv[2], repo_id, "the run")
            print("commit", result.oid)
    except (InputError, UploadError) as error:
        print(type(error).__name__ + ":", error)
"""


def test_a_pushed_run_loads_back_bit_equal(hub, run_folder, tmp_path):
    pushed = client(hub, tmp_path / "push", PUSH, "digits", run_folder, "upload")
    assert "repo tester/digits" in pushed.stdout, pushed.stdout + pushed.stderr
    assert f"commit {hub.commits['tester/digits'][-1]}" in pushed.stdout, pushed.stdout + pushed.stderr
    assert set(hub.repos["tester/digits"]) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "loss_curve.png",
        "metrics.jsonl",
        "model.safetensors",
        "preprocessor_config.json",
        "training/student.safetensors",
    }
    for name in ("README.md", "model.safetensors", "training/student.safetensors"):
        assert hub.repos["tester/digits"][name] == (run_folder / name).read_bytes()
    loaded = client(
        hub,
        tmp_path / "load",
        """
        import sys, torch
        from transformers import AutoImageProcessor, AutoModel
        model, local = AutoModel.from_pretrained("tester/digits"), AutoModel.from_pretrained(sys.argv[1])
        assert type(model) is type(local) and len(model.state_dict()) > 10
        for name, value in local.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        processor = AutoImageProcessor.from_pretrained("tester/digits", backend="pil")
        assert processor.to_dict() == AutoImageProcessor.from_pretrained(sys.argv[1], backend="pil").to_dict()
        print("equal")
        """,
        run_folder,
    )
    assert loaded.stdout.strip() == "equal", loaded.stdout + loaded.stderr
    assert any("resolve" in request and "model.safetensors" in request for request in hub.requests)


def test_pushing_again_in_the_background_adds_what_changed(hub, run_folder, tmp_path):
    first = client(hub, tmp_path, PUSH, "tester/again", run_folder, "upload", "private")
    assert "commit" in first.stdout, first.stdout + first.stderr
    assert "tester/again" in hub.private
    before = len(hub.commits["tester/again"])
    (run_folder / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n')
    second = client(hub, tmp_path, PUSH, "tester/again", run_folder, "upload")
    assert f"commit {hub.commits['tester/again'][-1]}" in second.stdout, second.stdout + second.stderr
    assert len(hub.commits["tester/again"]) == before + 1
    assert hub.repos["tester/again"]["metrics.jsonl"] == b'{"step": 2, "loss": 1.0}\n'


@pytest.mark.parametrize(
    ("hub_model_id", "token", "environment", "words"),
    [
        ("digits", None, {}, "--push_to_hub: no access token"),
        ("digits", "hf_wrong", {}, "the Hub refused or is out of reach"),
        ("a/b/c", "hf_test", {}, "--hub_model_id 'a/b/c'"),
        ("someone-else/digits", "hf_test", {}, "--hub_model_id 'someone-else/digits'"),
        ("tester/locked", "hf_test", {}, "the token may not write there"),
        ("digits", "hf_test", {"HF_HUB_OFFLINE": "1"}, "out of reach"),
        ("digits", "hf_test", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "out of reach"),
    ],
)
def test_what_would_fail_at_the_end_fails_at_the_start(
    hub, run_folder, tmp_path, hub_model_id, token, environment, words
):
    hub.read_only.add("tester/locked")
    result = client(hub, tmp_path, PUSH, hub_model_id, run_folder, token=token, **environment)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 1 and lines[0].startswith("InputError:") and words in lines[0], result.stdout
    assert "hf_wrong" not in result.stdout


def test_a_failed_upload_keeps_the_run_and_says_how_to_go_on(hub, run_folder, tmp_path):
    code = PUSH.replace("create_repo_early(sys.argv[1]", "(lambda name, private: name)(sys.argv[1]")
    result = client(hub, tmp_path, code, "tester/nowhere", run_folder, "upload")
    last = result.stdout.splitlines()[-1]
    assert last.startswith("UploadError: the upload to tester/nowhere failed"), result.stdout + result.stderr
    assert f"hf upload tester/nowhere {run_folder}" in last
    assert (run_folder / "model.safetensors").exists()
