"""`push` and `explore` hand their options on, and say in one line what is missing."""

import json
import sys

import pytest

from hf_simprune.cli import main
from hf_simprune.explore.images import ImageSource
from hf_simprune.hub import publish


@pytest.fixture
def pushed(monkeypatch):
    """What `publish` is called with; it answers that nothing had changed, then that a pull request was opened."""
    calls = []

    def record(folder, repo_id=None, **options):
        calls.append((folder, repo_id, options))
        pr_url = "https://hub/user/name/discussions/1" if options["create_pr"] else None
        return publish.Published("https://hub/user/name", "user/name", "c0ffee", False, pr_url is None, pr_url)

    monkeypatch.setattr(publish, "publish", record)
    return calls


def test_push_hands_everything_on(pushed, tmp_path, capsys):
    words = ["--private", "--create-pr", "--revision", "main", "--token", "hf_x", "--message", "Better"]
    assert main(["push", str(tmp_path), "user/name", *words]) == 0
    options = {"private": True, "create_pr": True, "revision": "main", "token": "hf_x", "message": "Better"}
    assert pushed == [(tmp_path, "user/name", options)]
    assert capsys.readouterr().out == "published at https://hub/user/name/discussions/1\n"
    assert main(["push", str(tmp_path)]) == 0
    assert pushed[1][1] is None and not any(pushed[1][2].values())
    assert "holds this content already: no commit was made" in capsys.readouterr().out
    assert main(["push", str(tmp_path), "--repo_id", "user/name", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] == "c0ffee"


def test_an_upload_that_fails_is_status_1(monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise publish.UploadError("the Hub is away; try again with: hf-simprune push x user/name")

    monkeypatch.setattr(publish, "publish", fail)
    assert main(["push", str(tmp_path), "user/name"]) == 1
    error = capsys.readouterr().err
    assert error == "error: the Hub is away; try again with: hf-simprune push x user/name\n"


def test_explore_without_gradio_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("hf_simprune.explore.app.find_spec", lambda name: None)
    assert main(["explore", "net"]) == 2
    assert "pip install 'hf-simprune[explore]'" in capsys.readouterr().err


def test_explore_hands_everything_on(monkeypatch, tmp_path, capsys):
    calls = []
    app = type(sys)("hf_simprune.explore.app")
    app.launch = lambda *words, **options: calls.append((words, options))
    space = type(sys)("hf_simprune.explore.space")
    space.write_space = lambda *words, **options: calls.append((words, options)) or tmp_path
    monkeypatch.setitem(sys.modules, "hf_simprune.explore.app", app)
    monkeypatch.setitem(sys.modules, "hf_simprune.explore.space", space)
    words = ["explore", "net", "--dataset", "images", "--model_revision", "v1", "--dataset_config_name", "small"]
    words += ["--dataset_revision", "v2", "--split", "test", "--image_column", "photo", "--token", "hf_x"]
    source = ImageSource("images", "small", "v2", "test", "photo", "hf_x")
    assert main([*words, "--port", "8000", "--open-browser", "false"]) == 0
    options = {"model_revision": "v1", "token": "hf_x", "port": 8000, "open_browser": False}
    assert calls.pop() == (("net", source), options)
    assert main([*words, "--space", str(tmp_path), "--json"]) == 0
    assert calls.pop() == ((str(tmp_path), "net", source), {"model_revision": "v1"})
    told = capsys.readouterr()
    assert json.loads(told.out) == {"model": "net", "space": str(tmp_path)}
    assert f"hf upload {tmp_path.name} {tmp_path} . --type space" in told.err


@pytest.mark.parametrize("name", ["dataset_config_name", "dataset_revision", "split", "image_column"])
def test_what_says_which_images_needs_a_data_set(capsys, name):
    assert main(["explore", "net", f"--{name}", "x"]) == 2
    assert f"--{name} x: there is no --dataset" in capsys.readouterr().err
