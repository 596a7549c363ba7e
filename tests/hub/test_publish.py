"""A folder goes to a hub on this machine, the same a second time changes nothing, and what cannot go is said."""

import hashlib
import json
import shutil
import subprocess
import sys
import textwrap
from dataclasses import fields

import pytest
from safetensors.torch import load_file, save_file

from hf_simprune.hub.publish import Published
from hf_simprune.hub.shared_files import shared_form

from .client import ROOT, Client
from .loopback import READ_TOKEN


PUBLISHED = {
    ".gitattributes",
    ".eval_results/benchmark.yaml",
    "README.md",
    "config.json",
    "loss_curve.png",
    "metrics.jsonl",
    "model.safetensors",
    "preprocessor_config.json",
    "training/arguments.yaml",
    "training/run.json",
}


def test_a_run_is_published_without_what_is_its_own(hub, client, finished_run):
    done = client.push(finished_run, "tester/digits", message="the run")
    head = hub.repositories["tester/digits"].resolve("main")
    assert set(head.files) == PUBLISHED
    assert all(data == (finished_run / name).read_bytes() for name, data in head.files.items() if name[0] != ".")
    assert (done["url"], done["commit"]) == (f"{hub.url}/tester/digits", head.sha)
    assert (done["created"], done["unchanged"], done["pr_url"]) == (True, False, None)
    assert head.message == "the run"
    left = {"checkpoint-10/", "logs/", "optimizer.pt", "notes.txt", "modeling_simprune_vit.py"}
    left |= {f"training/{name}" for name in ("student/", "initial/", "trackers.json", "pruned_tokens.safetensors")}
    assert left <= set(done["left_out"]) and "training/" not in done["left_out"]
    assert any(warning.startswith("README.md: ") for warning in done["warnings"])
    assert set(done) == {field.name for field in fields(Published)} | {"waits"}


def test_the_card_names_the_repository_where_it_named_the_folder(hub, client, run_folder):
    card = (run_folder / "README.md").read_text()
    use = '\n## Use\n\n```python\nmodel = AutoModel.from_pretrained("digits")\n```\n'
    (run_folder / "README.md").write_text(card + use)
    client.push(run_folder, "tester/addressed")
    published = hub.repositories["tester/addressed"].resolve("main").files["README.md"].decode()
    assert published == card + use.replace('"digits"', '"tester/addressed"')
    assert (run_folder / "README.md").read_text() == card + use
    assert client.push(run_folder, "tester/addressed")["unchanged"]


def test_folders_of_this_machine_stay_in_the_local_records_only(hub, client, run_folder):
    card = '\n## Use\n\n```python\nmodel = AutoModel.from_pretrained("some/vit")\n```\n\n```bash\n{}\n```\n'
    typed = "hf-simprune compress /home/jane/vit --output_dir '/home/jane/my runs/digits'"
    record = {"model": "/home/jane/vit", "command": typed, "options": {"output_dir": "/home/jane/my runs/digits"}}
    (run_folder / "README.md").write_text(card.format(typed))
    (run_folder / "compression.json").write_text(json.dumps(record))
    (run_folder / "training" / "arguments.yaml").write_text("dataset_name_or_path: ../images\nseed: 42\n")
    (run_folder / "LICENSE.txt").write_text("see /home/jane/licence")
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    done = client.push(run_folder, "tester/private-paths")
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before
    files = hub.repos["tester/private-paths"]
    short = "hf-simprune compress vit --output_dir digits"
    assert files["README.md"].decode() == card.format(short), "what a person wrote under Use stays"
    assert json.loads(files["compression.json"]) == {
        "model": "vit",
        "command": short,
        "options": {"output_dir": "digits"},
    }
    assert files["training/arguments.yaml"] == b"dataset_name_or_path: images\nseed: 42\n"
    told = [warning for warning in done["warnings"] if "this machine" in warning]
    assert told == ["LICENSE.txt names a folder of this machine, /home/jane: others will read it"]
    assert client.push(run_folder, "tester/private-paths")["unchanged"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("outputs/one", {"output_dir": "outputs/one"}), ("me/net", {"push_to_hub": True, "hub_model_id": "net"})],
)
def test_what_a_run_wrote_into_its_card_is_addressed_anew(run_folder, name, options):
    card = '\n## Use\n\n```python\nmodel = AutoModel.from_pretrained("{}")\n```\n'
    (run_folder / "README.md").write_text(card.format(name))
    assert isinstance(shared_form("README.md", run_folder / "README.md", "you/two"), type(run_folder))
    (run_folder / "training" / "arguments.yaml").write_text(json.dumps(options))
    assert shared_form("README.md", run_folder / "README.md", "you/two") == card.format("you/two").encode()


def test_the_same_content_makes_no_second_commit(hub, client, finished_run):
    first = client.push(finished_run, "tester/twice")
    before = len(hub.requests)
    again = client.push(finished_run, "tester/twice")
    assert (again["unchanged"], again["created"], again["commit"]) == (True, False, first["commit"])
    assert len(hub.commits["tester/twice"]) == 2  # the one that made it and ours
    assert not [request for request in hub.requests[before:] if request.split()[0] in ("POST", "PUT")]


def test_only_what_changed_is_sent_and_what_an_earlier_version_left_goes(hub, client, run_folder):
    client.push(run_folder, "tester/changed")
    (run_folder / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n')
    weights = load_file(run_folder / "model.safetensors")
    (run_folder / "model.safetensors").unlink()
    parts = [dict(list(weights.items())[:5]), dict(list(weights.items())[5:])]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, run_folder / name)
    index = {"weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part}}
    (run_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in ("preprocessor_config.json", "loss_curve.png", "training/arguments.yaml", "training/run.json"):
        (run_folder / path).unlink()
    earlier = {".eval_results/ILSVRC--imagenet-1k--top1.yaml": b"- value: 0.9"}
    theirs = {"notes.md": b"kept", ".eval_results/hle.yaml": b"- value: 0.1"}
    hub.repositories["tester/changed"].commit("main", "by hand", earlier | theirs)
    before = len(hub.requests)
    done = client.push(run_folder, "tester/changed")
    files = hub.repos["tester/changed"]
    kept = {".gitattributes", ".eval_results/benchmark.yaml", "README.md", "config.json", "metrics.jsonl"}
    assert set(files) == kept | {*names, "model.safetensors.index.json", *theirs}
    assert files["metrics.jsonl"] == b'{"step": 2, "loss": 1.0}\n' and not done["unchanged"]
    assert len([request for request in hub.requests[before:] if request.startswith("PUT")]) == 2


def test_code_goes_with_a_model_that_needs_it(hub, client, compressed):
    done = client.push(compressed, "tester/smaller")
    files = hub.repos["tester/smaller"]
    own = {path.name for path in compressed.iterdir()}
    assert set(files) == own | {".gitattributes"} and done["left_out"] == []
    assert {"modeling_simprune_vit.py", "configuration_simprune_vit.py", "reduction_simprune_vit.py"} < own


def test_names_and_visibility(hub, client, finished_run, tmp_path):
    done = client.push(finished_run, "bare", private=True)
    assert done["repo_id"] == "tester/bare" and "tester/bare" in hub.private
    named = shutil.copytree(finished_run, tmp_path / "by-folder")
    assert client.push(named)["repo_id"] == "tester/by-folder"
    assert "tester/by-folder" not in hub.private
    kind, message = client.refused(named, "tester/by-folder", private=True, message="the last one")
    assert kind == "InputError" and "exists and is public" in message
    assert message.endswith(f"hf-simprune push {named} tester/by-folder --private --message 'the last one'")
    assert client.push(finished_run, "tester/bare")["unchanged"] and "tester/bare" in hub.private


def test_a_pull_request_leaves_the_branch_alone(hub, client, finished_run):
    theirs = hub.add("somebody/net", {"config.json": b'{"model_type": "vit"}'})
    before = hub.commits["somebody/net"]
    done = client.push(finished_run, "somebody/net", create_pr=True)
    assert done["pr_url"] == f"{hub.url}/somebody/net/discussions/1"
    assert hub.commits["somebody/net"] == before
    assert theirs.files("refs/pr/1")["model.safetensors"] == (finished_run / "model.safetensors").read_bytes()
    mine = hub.add("tester/asked", {"config.json": b'{"model_type": "vit"}'})
    client.push(finished_run, "tester/asked", create_pr=True)
    assert client.push(finished_run, "tester/asked", revision="refs/pr/1")["unchanged"]
    assert set(mine.branches) == {"main", "refs/pr/1"}


def test_a_branch_is_written_to_if_it_is_there(hub, client, finished_run):
    client.push(finished_run, "tester/branches")
    kind, message = client.refused(finished_run, "tester/branches", revision="v2")
    assert kind == "InputError"
    assert message.startswith("--revision v2: tester/branches has no such branch")
    assert "hf repos branch create tester/branches v2" in message
    assert message.endswith(f"hf-simprune push {finished_run} tester/branches --revision v2")
    repository = hub.repositories["tester/branches"]
    main = repository.resolve("main").sha
    repository.branches["v2"] = repository.branches["main"][:1]
    done = client.push(finished_run, "tester/branches", revision="v2")
    assert done["url"].endswith("/tester/branches/tree/v2") and repository.resolve("v2").sha == done["commit"]
    assert repository.resolve("main").sha == main


@pytest.mark.parametrize(
    ("repo_id", "options", "words"),
    [
        ("a/b/c", {}, "a/b/c cannot name a repository: use letters, digits"),
        ("https://huggingface.co/a/b", {}, "cannot name a repository"),
        ("tester/new", {"revision": "v2"}, "--revision v2: tester/new has no such branch"),
        ("tester/new", {"create_pr": True}, "--create-pr: tester/new does not exist"),
        ("tester/new", {"create_pr": True, "revision": "v2"}, "--create-pr and --revision v2 exclude each other"),
        ("tester/new", {"token": "hf_wrong"}, "does not accept the access token (401"),
        ("tester/new", {"token": READ_TOKEN}, "the token may not write there (403"),
        ("somebody/new", {}, "the token may not write there (403"),
        ("somebody/theirs", {}, "the token may not write there (403"),
        ("tester/locked", {}, "the token may not write there (403"),
        ("somebody/gated", {"create_pr": True}, "somebody/gated is gated (403"),
        ("somebody/hidden", {"create_pr": True}, "does not exist, or the token may not see it"),
        ("tester/bert", {}, "already holds another model (model_type bert, not vit)"),
        ("tester/adapter", {}, "already holds another model (adapter_config.json)"),
    ],
)
def test_what_the_hub_does_not_allow_is_one_line_and_makes_nothing(hub, client, finished_run, repo_id, options, words):
    vit = {"config.json": b'{"model_type": "vit"}'}
    for name in ("somebody/theirs", "tester/locked", "somebody/gated"):
        hub.add(name, vit)
    hub.repositories["somebody/gated"].gated = True
    hub.add("somebody/hidden", vit, private=True)
    hub.add("tester/bert", {"config.json": b'{"model_type": "bert"}'})
    hub.add("tester/adapter", {"adapter_config.json": b"{}"})
    hub.read_only.add("tester/locked")
    before = {name: found.resolve("main").sha for name, found in hub.repositories.items()}
    kind, message = client.refused(finished_run, repo_id, **options)
    assert kind == "InputError" and words in message
    assert "hf_" not in message.replace("hf_simprune", "")
    assert {name: found.resolve("main").sha for name, found in hub.repositories.items()} == before
    if "(40" in message:
        told = message.split("try again with: ")[1]
        pr = " --create-pr" if options.get("create_pr") else ""
        assert told == f"hf-simprune push {finished_run} {repo_id}{pr}"


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "is no folder"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{}"), "names no model_type"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors cannot be read"),
        (lambda folder: needs(folder, "elsewhere.Net"), "its auto_map needs elsewhere.py, which is not there"),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), "its metadata cannot be read"),
        (lambda folder: (folder / "README.md").write_text(f"key: hf_{'a' * 34}"), "holds an access token"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_loaded_is_refused_before_anything_is_made(hub, client, run_folder, broken, words):
    broken(run_folder)
    before = len(hub.requests)
    kind, message = client.refused(run_folder, "tester/broken")
    assert kind == "InputError" and words in message
    assert len(hub.requests) == before


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def needs(folder, name):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": name}}))


def test_without_a_token_or_a_network_nothing_is_tried(hub, finished_run, tmp_path):
    before = len(hub.requests)
    with Client(hub, tmp_path / "a", token=None) as client:
        kind, message = client.refused(finished_run, "tester/none")
        assert kind == "InputError" and "tester/none: no access token: run `hf auth login`" in message
        assert f"try again with: hf-simprune push {finished_run} tester/none" in message
        answer = client.call("create_repo_early", hub_model_id="none")
        assert answer["message"].startswith("--push_to_hub: no access token") and not answer["torch"]
    with Client(hub, tmp_path / "b", HF_HUB_OFFLINE="1") as client:
        kind, message = client.refused(finished_run, "tester/none")
        assert kind == "InputError" and "HF_HUB_OFFLINE is set: unset it" in message
    assert len(hub.requests) == before
    with Client(hub, tmp_path / "c", HF_ENDPOINT="http://127.0.0.1:9") as client:
        kind, message = client.refused(finished_run, "tester/none", private=True)
        assert kind == "UploadError" and "the Hub is out of reach (" in message
        assert message.endswith(f"try again with: hf-simprune push {finished_run} tester/none --private")
        answer = client.call("create_repo_early", hub_model_id="tester/none")
        assert answer["error"] == "InputError" and "the Hub is out of reach" in answer["message"]


LOADING = """
    import sys, torch
    class Nowhere:
        @staticmethod
        def find_spec(name, *rest):
            if name.split(".")[0] == "hf_simprune":
                raise ModuleNotFoundError(f"No module named {name!r}")
    sys.meta_path.insert(0, Nowhere)
    from safetensors.torch import load_file
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

    def same(model, saved):
        found = model.state_dict()
        assert len(saved) > 20 and set(saved) == set(found), set(saved) ^ set(found)
        assert all(torch.equal(found[name], value) for name, value in saved.items())
        return type(model).__module__.split(".")[0]

    run, smaller, pixels = sys.argv[1], sys.argv[2], torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    weights = load_file(f"{smaller}/model.safetensors")
    stock = AutoModel.from_pretrained(run).state_dict()
    assert same(AutoModel.from_pretrained("tester/net"), stock) == "transformers"
    processor = AutoImageProcessor.from_pretrained("tester/net", backend="pil")
    assert processor.to_dict() == AutoImageProcessor.from_pretrained(run, backend="pil").to_dict()
    model = AutoModelForImageClassification.from_pretrained("tester/cut", trust_remote_code=True)
    assert same(model, weights) == "transformers_modules"
    with torch.no_grad():
        without = model(pixels).logits
    sys.meta_path.remove(Nowhere)
    import hf_simprune.models
    model = AutoModelForImageClassification.from_pretrained("tester/cut")
    assert same(model, weights) == "hf_simprune"
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, without)
        local = AutoModelForImageClassification.from_pretrained(smaller)
        assert torch.equal(local(pixels).logits, without)
    print("equal")
"""


def test_another_process_loads_the_same_bits_with_and_without_this_package(
    hub, client, finished_run, compressed, tmp_path
):
    client.push(finished_run, "tester/net")
    client.push(compressed, "tester/cut", private=True)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOADING), str(finished_run), str(compressed)],
        env=hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.stdout.strip() == "equal", result.stdout + result.stderr
    assert hub.asked("resolve") and hub.asked("modeling_simprune_vit.py")
    digest = hashlib.sha256((compressed / "model.safetensors").read_bytes()).hexdigest()
    assert digest in hub.stored
