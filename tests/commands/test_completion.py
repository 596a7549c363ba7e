"""Shell completion, tried in the shells that are installed."""

import shutil
import subprocess
from dataclasses import fields

import pytest

from hf_simprune.commands import COMMANDS, completion
from hf_simprune.dino.arguments import DinoArguments


@pytest.fixture(scope="module")
def in_bash(tmp_path_factory):
    """Gives what bash offers for the last of some words."""
    script = tmp_path_factory.mktemp("bash") / "completion.sh"
    script.write_text(completion.bash())
    code = f"""source {script}
while read -ra COMP_WORDS; do
    COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
    [[ ${{COMP_WORDS[-1]}} == EMPTY ]] && COMP_WORDS[-1]=""
    _hf_simprune; echo "${{COMPREPLY[@]}}"
done"""

    def offered(*lines: str) -> list[list[str]]:
        text = "\n".join(lines) + "\n"
        found = subprocess.run(["bash", "-uc", code], input=text, capture_output=True, text=True, timeout=30)
        assert found.stderr == ""
        return [line.split() for line in found.stdout.split("\n")[: len(lines)]]

    return offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
def test_bash_offers_commands_options_and_values(in_bash):
    lines = {
        "hf-simprune EMPTY": [*COMMANDS, "--help", "--version"],
        "hf-simprune comp": ["compress", "completion"],
        "hf-simprune compress --max_c": ["--max_cost"],
        "hf-simprune compress --max-c": ["--max_cost"],
        "hf-simprune compress --granularity EMPTY": ["block", "half"],
        "hf-simprune compress net --strategy br-g": ["br-greedy"],
        "hf-simprune compress --push-to-hub f": ["false"],
        "hf-simprune compress path/to/mo": [],  # a file, which the shell completes itself
        "hf-simprune analyze --remove": [],
        "hf-simprune completion z": ["zsh"],
        "hf-simprune train --output": ["--output_dir", "--output"],
        "hf-simprune push --js": ["--json"],
    }
    found = in_bash(*lines)
    assert {line: sorted(words) for line, words in zip(lines, found)} == {k: sorted(v) for k, v in lines.items()}


def test_every_option_of_every_command_is_in_every_script():
    scripts = {"bash": completion.bash(), "zsh": completion.zsh(), "fish": completion.fish()}
    for command in COMMANDS:
        names = {word.name for word in completion.words(command)}
        assert {"--json", "--help"} <= names
        for name in names:
            assert name in scripts["bash"] and f"'{name}[" in scripts["zsh"]
            assert f"__fish_seen_subcommand_from {command}' -l {name[2:]} " in scripts["fish"]
    assert {f"--{entry.name}" for entry in fields(DinoArguments)} < {word.name for word in completion.words("train")}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_shell_itself_accepts_its_script(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not here")
    script = tmp_path / f"completion.{shell}"
    script.write_text({"zsh": completion.zsh, "fish": completion.fish}[shell]())
    found = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, timeout=30)
    assert (found.returncode, found.stderr) == (0, "")


def test_quotes_in_a_help_text_end_no_string(monkeypatch):
    odd = completion.Word("--it", "the network's [own] one: `x`", None)
    monkeypatch.setattr(completion, "words", lambda command: iter([odd]))
    assert r"'--it[the network'\''s \[own\] one\: `x`]:value:_files'" in completion.zsh()
    assert r"-d 'the network\'s [own] one: `x`'" in completion.fish()
