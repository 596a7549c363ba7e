"""What any command has in common: aliases, a bare word, a file, and mistakes in one line."""

from dataclasses import dataclass

import pytest

from hf_simprune.errors import InputError
from hf_simprune.options.fields import option, required, values
from hf_simprune.options.parsing import Options


@dataclass(kw_only=True)
class Where:
    _argument_group_name = "where"

    output_dir: str = required("Folder. Required.")
    model_name: str | None = option(None, "Network.")


@dataclass(kw_only=True)
class How:
    _argument_group_name = "how"

    steps: int = option(3, "Steps.")
    kinds: list[str] = values(("fold",), "Kinds.")
    share: float | None = option(None, "Share.")
    fast: bool = option(False, "Faster.")


@dataclass(kw_only=True)
class Both(Where, How):
    _argument_group_name = "both"


OPTIONS = Options(
    kind=Both,
    groups=(Where, How),
    description="Does a thing.",
    required=("output_dir", "model_name"),
    aliases={"output": "output_dir"},
    positional=("model_name",),
    prog="do-it",
)


def test_defaults_and_the_bare_word():
    expected = Both(output_dir="out", model_name="net")
    assert OPTIONS.parse(["net", "--output_dir", "out"]) == expected
    assert OPTIONS.parse(["--output_dir", "out", "net"]) == expected
    assert OPTIONS.parse(["--output_dir", "out", "--model-name", "net"]) == expected


def test_a_switch_leaves_the_bare_word_after_it_alone():
    expected = Both(output_dir="out", model_name="net", fast=True)
    assert OPTIONS.parse(["--output", "out", "--fast", "net"]) == expected
    assert OPTIONS.parse(["--output", "out", "--fast", "true", "net"]) == expected
    assert not OPTIONS.parse(["--output", "out", "--fast", "no", "net"]).fast


@pytest.mark.parametrize("words", [["--output", "o"], ["--output=o"], ["--output-dir", "o"], ["--output_dir=o"]])
def test_aliases_and_spellings(words):
    assert OPTIONS.parse(["net", *words]).output_dir == "o"


def test_a_value_that_looks_like_an_alias_stays():
    assert OPTIONS.parse(["net", "--output", "output"]).output_dir == "output"


def test_file_and_command_line(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("output: out\nmodel-name: net\nsteps: 5\nkinds: [linear, mlp]\nshare: 5e-1\n")
    parsed = OPTIONS.parse(["--config", str(config), "--steps", "7", "--fast"])
    assert parsed == Both(output_dir="out", model_name="net", steps=7, kinds=["linear", "mlp"], share=0.5, fast=True)
    assert OPTIONS.parse(["--config", str(config), "other"]).model_name == "other"
    assert OPTIONS.parse(["--config", str(config), "--share", "none"]).share is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["net"], "--output_dir is required"),
        (["--output", "o"], "MODEL_NAME, or --model_name, is required"),
        (["net", "other", "--output", "o"], "'other' belongs to no option"),
        (["net", "--model_name", "other", "--output", "o"], "'net' belongs to no option"),
        (["net", "--output", "o", "--stepps", "3"], "unknown option --stepps; did you mean --steps?"),
        (["net", "--outputt", "o"], "did you mean --output?"),
        (["net", "--output", "o", "--steps", "many"], "--steps: invalid int value: 'many'"),
    ],
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(InputError) as caught:
        OPTIONS.parse(words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: o\noutput_dir: o", "output_dir is given twice"),
        ("outputs: o", "unknown option outputs; did you mean output?"),
        ("kinds: fold", "kinds: expected a list"),
    ],
)
def test_mistakes_in_a_file_name_it(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        OPTIONS.parse(["net", "--config", str(tmp_path / "c.yaml")])
    assert str(caught.value).startswith(f"--config {tmp_path / 'c.yaml'}: ") and message in str(caught.value)


def test_help_names_the_program_groups_and_aliases(capsys):
    with pytest.raises(SystemExit) as caught:
        OPTIONS.parse(["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert shown.startswith("usage: do-it [MODEL_NAME] [--config FILE]")
    assert "\nwhere:" in shown and "\nhow:" in shown and "Also --output." in shown
