"""Colour where a terminal wants it, and plain text everywhere else."""

import io

import pytest

from hf_simprune.rba.report import text_table
from hf_simprune.terminal import highlighted, wants_colour


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "environ", "expected"),
    [
        (Terminal(), {}, True),
        (io.StringIO(), {}, False),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"FORCE_COLOR": "1"}, True),
        (io.StringIO(), {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_when_there_is_colour(monkeypatch, stream, environ, expected):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert wants_colour(stream) is expected


def test_a_table_is_the_same_text_with_bold_names_and_a_dim_rule():
    text = "before\n\n" + text_table(["name", "value"], [["a", "1"], ["b", "2"]], "Title") + "\n\nafter"
    shown = highlighted(text, colour=True)
    assert shown.replace("\033[1m", "").replace("\033[2m", "").replace("\033[0m", "") == text
    assert shown.split("\n")[2:5] == [
        "\033[1mTitle\033[0m", "\033[1mname  value\033[0m", "\033[2m----  -----\033[0m"
    ]  # fmt: skip
    assert highlighted(text, colour=False) == text
    assert highlighted("no table - at all", colour=True) == "no table - at all"
