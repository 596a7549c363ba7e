"""A hub that fails, is busy or goes away in the middle: the push goes on where it was, or says how to try again."""

import pytest


def commits(hub, done):
    return len(hub.commits[done["repo_id"]])


@pytest.mark.parametrize("status", [None, 500])
def test_an_upload_that_breaks_off_is_taken_up_again(misbehaving, client, run_folder, status):
    name = f"tester/half-{status}"
    fault = misbehaving.fail("PUT /storage", times=2, status=status, share=0.5)
    done = client.push(run_folder, name)
    assert fault.met == 2 and not done["unchanged"]
    assert misbehaving.repos[name]["model.safetensors"] == (run_folder / "model.safetensors").read_bytes()
    assert commits(misbehaving, done) == 2


def test_what_reached_the_hub_before_a_failure_is_not_sent_again(misbehaving, client, run_folder):
    fault = misbehaving.fail("/commit/", times=100)
    kind, message = client.refused(run_folder, "tester/resumed")
    assert kind == "UploadError" and fault.met > 1
    assert "the Hub answered 500" in message
    assert message.endswith(f"{run_folder} is as it was, try again with: hf-simprune push {run_folder} tester/resumed")
    misbehaving.faults.clear()
    sent = len(misbehaving.asked("PUT /storage"))
    assert sent == 2  # the weights and the picture, once in all trials
    done = client.push(run_folder, "tester/resumed")
    assert len(misbehaving.asked("PUT /storage")) == sent
    assert (done["created"], done["unchanged"]) == (False, False) and commits(misbehaving, done) == 2


def test_storage_that_stays_broken_is_said_in_one_line(misbehaving, client, run_folder):
    misbehaving.fail("PUT /storage", times=100, share=0.5)
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    answer = client.call("publish", folder=run_folder, repo_id="tester/broken-storage", private=True)
    assert answer["error"] == "UploadError" and "\n" not in answer["message"]
    assert "the Hub answered 500" in answer["message"] and "/storage/" not in answer["message"]
    assert answer["message"].endswith(f"hf-simprune push {run_folder} tester/broken-storage --private")
    assert sum(answer["waits"]) < 60
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before
    assert len(misbehaving.commits["tester/broken-storage"]) == 1


@pytest.mark.parametrize(
    "request_line", ["GET /api/models/", "repos/create", "validate-yaml", "preupload", "/commit/"]
)
def test_a_busy_hub_is_waited_for_as_long_as_it_asks(misbehaving, client, run_folder, request_line):
    name = "tester/busy-" + "".join(filter(str.isalpha, request_line)).lower()
    fault = misbehaving.fail(request_line, times=2, status=429, headers={"Retry-After": "17"})
    done = client.push(run_folder, name)
    assert fault.met == 2
    assert [round(wait) for wait in done["waits"] if wait >= 17] in ([17, 17], [18, 18])  # the client adds a second
    assert commits(misbehaving, done) == 2


@pytest.mark.parametrize("request_line", ["GET /api/models/", "preupload", "/commit/"])
@pytest.mark.parametrize("headers", [{"Retry-After": "86400"}, {"ratelimit": '"api";r=0;t=86400'}])
def test_a_hub_that_asks_for_a_day_is_not_waited_for(misbehaving, client, run_folder, request_line, headers):
    misbehaving.fail(request_line, times=100, status=429, headers=headers)
    answer = client.call("publish", folder=run_folder, repo_id="tester/a-day")
    assert answer["error"] == "UploadError" and "the Hub asks to wait (86400 s" in answer["message"]
    assert "try again with: hf-simprune push" in answer["message"] and answer["waits"] == []


def test_waiting_ends_after_some_minutes_in_all(misbehaving, client, run_folder):
    misbehaving.fail("/commit/", times=100, status=429, headers={"Retry-After": "100"})
    answer = client.call("publish", folder=run_folder, repo_id="tester/again-and-again")
    assert answer["waits"] == [100, 100, 100] and "asks to wait (100 s, more than the 30 s" in answer["message"]


@pytest.mark.parametrize("request_line", ["repos/create", "validate-yaml", "preupload", "batch", "/verify"])
def test_a_connection_that_is_cut_is_made_again(misbehaving, client, run_folder, request_line):
    fault = misbehaving.fail(f"POST .*{request_line}", status=None, share=0.5)
    name = "tester/cut-" + "".join(filter(str.isalpha, request_line))
    done = client.push(run_folder, name)
    assert fault.met == 1 and commits(misbehaving, done) == 2 and done["created"]


def test_a_commit_whose_answer_is_lost_is_not_made_twice(misbehaving, client, run_folder):
    fault = misbehaving.fail("POST .*/commit/", status=None, done=True)
    done = client.push(run_folder, "tester/lost")
    assert fault.met == 1 and commits(misbehaving, done) == 2
    assert done["commit"] == misbehaving.commits["tester/lost"][-1] and not done["unchanged"]


def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(misbehaving, client, run_folder):
    theirs = misbehaving.add("somebody/open", {"config.json": b'{"model_type": "vit"}'})
    misbehaving.fail("POST .*/commit/", status=None, done=True)
    kind, message = client.refused(run_folder, "somebody/open", create_pr=True)
    assert kind == "UploadError" and f"look at {misbehaving.url}/somebody/open/discussions first" in message
    assert message.endswith(f"hf-simprune push {run_folder} somebody/open --create-pr")
    assert [name for name in theirs.branches if "pr" in name] == ["refs/pr/1"]


def test_what_somebody_commits_meanwhile_is_looked_at_first(misbehaving, client, run_folder):
    """The commit names the state it was made for, and the Hub refuses it for another one."""
    repository = misbehaving.add("tester/shared", {"config.json": b'{"model_type": "vit"}'})
    stale = {"modeling_simprune_vit.py": b"", "notes.md": b"theirs"}
    misbehaving.fail("POST .*/commit/", first=lambda: repository.commit("main", "theirs", stale))
    done = client.push(run_folder, "tester/shared")
    assert len(misbehaving.asked("/commit/main")) == 2 and done["commit"] == repository.resolve("main").sha
    files = repository.files("main")
    assert files["notes.md"] == b"theirs" and "modeling_simprune_vit.py" not in files
    assert commits(misbehaving, done) == 4


def test_another_model_that_came_meanwhile_stays(misbehaving, client, run_folder):
    repository = misbehaving.add("tester/raced", {"config.json": b'{"model_type": "vit"}'})
    theirs = {"config.json": b'{"model_type": "bert"}'}
    misbehaving.fail("POST .*/commit/", first=lambda: repository.commit("main", "theirs", theirs))
    kind, message = client.refused(run_folder, "tester/raced")
    assert kind == "InputError" and "already holds another model (model_type bert, not vit)" in message
    assert repository.files("main")["config.json"] == theirs["config.json"]


def test_a_repository_that_was_made_without_an_answer_is_found(misbehaving, client, run_folder):
    fault = misbehaving.fail("POST /api/repos/create", status=None, done=True)
    done = client.push(run_folder, "tester/made-once", private=True)
    assert fault.met == 1 and done["created"] and commits(misbehaving, done) == 2
    assert misbehaving.private >= {"tester/made-once"}


def test_a_run_keeps_its_result_whatever_the_hub_says(misbehaving, client, run_folder):
    assert client.call("create_repo_early", hub_model_id="early", private=True)["published"] == "tester/early"
    assert "tester/early" in misbehaving.private
    misbehaving.add("somebody/else", {"config.json": b'{"model_type": "vit"}'})
    for name, words in (("somebody/else", "may not write there (403"), ("tester/public-bert", "another model")):
        misbehaving.add("tester/public-bert", {"config.json": b'{"model_type": "bert"}'})
        answer = client.call("upload_run", folder=run_folder, repo_id=name, message="the end")
        assert answer["error"] == "UploadError" and words in answer["message"]
        assert f"hf-simprune push {run_folder} {name}" in answer["message"]
    done = client.call("upload_run", folder=run_folder, repo_id="tester/early", message="the end")
    assert done["published"]["created"] is False and misbehaving.commits["tester/early"][1:]


@pytest.mark.parametrize(
    ("hub_model_id", "options", "words"),
    [
        ("digits", {"token": "hf_wrong"}, "does not accept the access token (401"),
        ("a/b/c", {}, "--hub_model_id a/b/c cannot name a repository"),
        ("someone-else/digits", {}, "--push_to_hub: someone-else/digits: the token may not write there"),
        ("tester/locked", {}, "--push_to_hub: tester/locked: the token may not write there (403"),
        ("tester/open", {"private": True}, "tester/open exists and is public"),
        ("tester/gguf", {}, "already holds another model (weights.gguf)"),
    ],
)
def test_what_would_fail_after_a_run_fails_before_it(misbehaving, client, hub_model_id, options, words):
    for name in ("tester/locked", "tester/open"):
        misbehaving.add(name, {"config.json": b"{}"})
    misbehaving.add("tester/gguf", {"weights.gguf": b""})
    misbehaving.read_only.add("tester/locked")
    answer = client.call("create_repo_early", hub_model_id=hub_model_id, **options)
    assert answer["error"] == "InputError" and words in answer["message"]
    assert "\n" not in answer["message"] and "hf_wrong" not in answer["message"] and "None" not in answer["message"]
