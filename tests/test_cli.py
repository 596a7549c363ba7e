"""The command `hf-simprune`: what a newcomer types."""

import json
import os
import signal
import stat
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest

import hf_simprune
from hf_simprune.cli import EXIT_CODES, main
from hf_simprune.commands import COMMANDS

from .tiny_run import ROOT


WORDS = ["net", "--dataset", "data", "--output", "out"]
HELP = """
import contextlib, io, json, sys, time
from hf_simprune.cli import main
shown, seconds = {}, {}
for command in sys.argv[1:]:
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            status = main([command, "--help"])
        except SystemExit as end:
            status = end.code
    shown[command] = [status, text.getvalue()]
    seconds[command] = time.perf_counter() - began
heavy = [name for name in ("torch", "transformers", "datasets", "huggingface_hub") if name in sys.modules]
print(json.dumps({"shown": shown, "heavy": heavy, "seconds": seconds}))
"""


@pytest.fixture(scope="module")
def helps():
    """What `--help` of every command shows in a fresh process, and what that imports."""
    found = subprocess.run(
        [sys.executable, "-c", HELP, *COMMANDS], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_without_words_it_shows_what_there_is(capsys):
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown and command.summary in shown for name, command in COMMANDS.items())
    assert "hf-simprune compress MODEL --dataset" in shown
    assert all(f"{code} " in shown and meaning in shown for code, meaning in EXIT_CODES.items())
    assert main(["--help"]) == 0 and capsys.readouterr().out == shown
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"hf-simprune {hf_simprune.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compres", *WORDS], "unknown command compres; did you mean compress?"),
        (["prune"], "unknown command prune"),
        (["sing"], "unknown command sing: choose one of train, analyze, compress"),
        (["compress"], "MODEL_NAME_OR_PATH, or --model_name_or_path, is required"),
        (["compress", "net"], "--dataset_name_or_path is required"),
        (["compress", *WORDS], "no budget: give exactly one of --remove_blocks"),
        (["compress", *WORDS, "--remove-block", "2"], "unknown option --remove_block; did you mean --remove_blocks?"),
        (["analyze", *WORDS, "--remove-blocks", "2"], "unknown option --remove_blocks"),
        (["train", "--output", "out"], "--dataset_name_or_path is required"),
        (["evaluate", "net"], "--dataset_name_or_path is required"),
        (["evaluate", "net", "--dataset", "data", "--knn_k", "0"], "--knn_k 0: must be 1 or more"),
        (["evaluate", "net", "--dataset", "data", "--baseline_revision", "a"], "there is no --baseline"),
        (
            ["evaluate", "net", "--dataset", "data", "--seed", f"{2**63}"],
            f"--seed {2**63}: must be from 0 to {2**63 - 1}",
        ),
        (["analyze", *WORDS, "--seed", "-1"], f"--seed -1: must be from 0 to {2**63 - 1}"),
        (["compress", *WORDS, "--remove-blocks", "2", "--seed", "9" * 20], "must be from 0 to"),
        (["train", *WORDS[1:], "--seed", f"{2**32}"], f"--seed {2**32}: must be from 0 to {2**32 - 1}"),
        (["info"], "MODEL_NAME_OR_PATH, or --model_name_or_path, is required"),
        (["info", "/no/such/model"], "--model_name_or_path /no/such/model: there is no such folder"),
        (["push"], "FOLDER, or --folder, is required"),
        (["push", "/no/such/folder", "user/name"], "--folder /no/such/folder: there is no such folder"),
        (["push", "a", "user/name", "third"], "'third' belongs to no option"),
        (["explore", "net", "--port", "70000"], "--port 70000: must be from 1 to 65535"),
        (["explore", ".", "--model_revision", "v1"], "--model_revision v1: . is on this disk"),
        (["completion", "tcsh"], "--shell tcsh is unknown: choose one of bash, zsh, fish"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words, message, capsys):
    for line in (words, [*words, "--json"]):
        assert main(line) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1


def test_help_of_no_command_waits_for_torch(helps):
    assert helps["heavy"] == []
    print("seconds:", {name: round(seconds, 3) for name, seconds in helps["seconds"].items()})


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_names_it_and_ends_with_examples(helps, command):
    status, shown = helps["shown"][command]
    assert status == 0 and shown.startswith(f"usage: hf-simprune {command} ")
    options, _, examples = shown.partition("\nexamples:\n")
    assert "--json" in options and f"hf-simprune {command} " in examples


def test_ctrl_c_is_one_line_and_status_130(monkeypatch, capsys):
    from hf_simprune.rba import run

    monkeypatch.setattr(run, "run_compress", lambda args: os.kill(os.getpid(), signal.SIGINT))
    assert main(["compress", *WORDS, "--remove-blocks", "2"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"


def test_machines_get_one_json_object_whoever_prints(monkeypatch, capfd, tmp_path):
    from hf_simprune.rba import run

    def noisy(args):
        print("from Python")
        os.write(1, b"from a library in C\n")
        (tmp_path / "redundancy.json").write_text('{"model": "é", "spans": []}')

    monkeypatch.setattr(run, "run_analyze", noisy)
    words = ["analyze", "net", "--dataset", "data", "--output", str(tmp_path)]
    assert main([*words, "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"model": "é", "spans": []} and "é" in captured.out
    assert "from Python" in captured.err and "from a library in C" in captured.err
    assert main(words) == 0
    captured = capfd.readouterr()
    assert sorted(captured.out.splitlines()) == ["from Python", "from a library in C"] and captured.err == ""


def test_of_several_processes_the_first_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["completion", "bash", "--json"]) == 0
    assert capsys.readouterr().out == ""


def test_a_reader_that_has_had_enough_is_no_error():
    code = "import sys; from hf_simprune.cli import main; sys.exit(main(['completion', 'fish']))"
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    writer.stdout.close()
    assert writer.stderr.read() == b"" and writer.wait(60) == 141


def test_it_is_installed_as_a_command():
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.scripts]\nhf-simprune = "hf_simprune.cli:main"' in text


def test_the_hub_command_line_finds_it_as_an_extension(tmp_path):
    """`hf` runs the script hf-simprune of an installed extension as `hf simprune`; installing it asks GitHub."""
    extension = tmp_path / ".local" / "share" / "hf" / "extensions" / "hf-simprune"
    script = extension / "hf-simprune"
    extension.mkdir(parents=True)
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m hf_simprune.cli "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    manifest = {
        "owner": "someone", "repo": "hf-simprune", "repo_id": "someone/hf-simprune", "short_name": "simprune",
        "executable_path": str(script), "type": "python", "installed_at": datetime.now(timezone.utc).isoformat(),
    }  # fmt: skip
    (extension / "manifest.json").write_text(json.dumps(manifest))
    environ = {
        **os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    hf = Path(sys.executable).with_name("hf")
    found = subprocess.run(
        [hf, "simprune", "push", "/no/such"], env=environ, capture_output=True, text=True, timeout=60
    )
    assert (found.returncode, found.stderr) == (2, "error: --folder /no/such: there is no such folder\n")


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_help_that_nobody_reads_is_no_error(words):
    code = f"import sys; from hf_simprune.cli import main; sys.exit(main({words}))"
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    writer.stdout.close()
    assert writer.stderr.read() == b"" and writer.wait(60) == 141


def test_sigterm_cleans_up_and_is_one_line_and_status_130(monkeypatch, capsys):
    from hf_simprune.rba import run

    cleaned = []

    def stopped(args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a launcher's copy
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run, "run_compress", stopped)
    assert main(["compress", *WORDS, "--remove-blocks", "2"]) == 130 and cleaned == [True]
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_ends_a_child_process_as_ever(monkeypatch):
    from hf_simprune.rba import run

    def fork(args):
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    ended = []
    monkeypatch.setattr(run, "run_compress", fork)
    assert main(["compress", *WORDS, "--remove-blocks", "2"]) == 0 and ended == [-signal.SIGTERM]
