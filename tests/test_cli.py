"""The command `hf-simprune`: what a newcomer types."""

import os
import signal
import subprocess
import sys

import pytest

import hf_simprune
from hf_simprune.cli import main

from .tiny_run import ROOT


WORDS = ["net", "--dataset", "data", "--output", "out"]


def test_without_words_it_shows_what_there_is(capsys):
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert "analyze" in shown and "compress" in shown and "Example: hf-simprune compress MODEL" in shown
    assert main(["--help"]) == 0 and capsys.readouterr().out == shown
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"hf-simprune {hf_simprune.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compres", *WORDS], "unknown command compres; did you mean compress?"),
        (["train"], "unknown command train: choose one of analyze, compress"),
        (["compress"], "MODEL_NAME_OR_PATH, or --model_name_or_path, is required"),
        (["compress", "net"], "--dataset_name_or_path is required"),
        (["compress", *WORDS], "no budget: give exactly one of --remove_blocks"),
        (["compress", *WORDS, "--remove-block", "2"], "unknown option --remove_block; did you mean --remove_blocks?"),
        (["analyze", *WORDS, "--remove-blocks", "2"], "unknown option --remove_blocks"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words, message, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("command", ["analyze", "compress"])
def test_help_of_a_command_does_not_wait_for_torch(command):
    code = (
        "import sys\nfrom hf_simprune.cli import main\n"
        f"try:\n    main(['{command}', '--help'])\n"
        "except SystemExit as end:\n    print('status', end.code, 'torch' in sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.stdout.splitlines()[-1] == "status 0 False", found.stderr
    assert found.stdout.startswith(f"usage: hf-simprune {command} [MODEL_NAME_OR_PATH] [--config FILE]")


def test_ctrl_c_is_one_line_and_status_130(monkeypatch, capsys):
    from hf_simprune.rba import run

    monkeypatch.setattr(run, "run_compress", lambda args: os.kill(os.getpid(), signal.SIGINT))
    assert main(["compress", *WORDS, "--remove-blocks", "2"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"


def test_it_is_installed_as_a_command():
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.scripts]\nhf-simprune = "hf_simprune.cli:main"' in text
