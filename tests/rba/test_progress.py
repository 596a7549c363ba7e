"""Progress bars of analyses and compressions."""

from types import SimpleNamespace

import pytest

from hf_simprune.cli import main
from hf_simprune.errors import InputError
from hf_simprune.rba import run


@pytest.mark.parametrize(
    ("terminal", "quiet", "shown"), [(False, False, False), (True, False, True), (True, True, False)]
)
def test_bars_are_for_terminals(monkeypatch, tmp_path, terminal, quiet, shown):
    asked = []

    def remember(*_, progress, **__):
        asked.append(progress)
        raise InputError("seen")

    start = SimpleNamespace(checkpoint=SimpleNamespace(model=None), images=SimpleNamespace(calibration=None))
    start.accelerator = None
    monkeypatch.setattr(run, "analyze", remember)
    monkeypatch.setattr(run, "_start", lambda args: start)
    monkeypatch.setattr(run.sys.stderr, "isatty", lambda: terminal, raising=False)
    words = ["--dataset", "data", "--output", str(tmp_path / "out"), *(["--disable_tqdm"] if quiet else [])]
    assert main(["analyze", "net", *words]) == 2 and asked == [shown]
