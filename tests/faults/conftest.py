"""Counting the trials of the fault tests, and what their runs share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..tiny_run import write_images
from .warm_runs import WarmServer


_PROPERTY = "trials"


@pytest.fixture
def trials(record_property) -> Callable[[str, int], None]:
    """`trials("kills, then resumed", 20)`: what was tried and how often, for the table at the end."""
    return lambda what, count: record_property(_PROPERTY, f"{count:6,}  {what}")


def pytest_terminal_summary(terminalreporter) -> None:
    lines = [
        f"{text}  [{outcome}]"
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
        for name, text in report.user_properties
        if name == _PROPERTY
    ]
    if lines:
        terminalreporter.section("fault trials")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmServer]:
    """Starts runs in forks of one process that has imported everything."""
    with WarmServer() as server:
        yield server


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    folder: Path = tmp_path_factory.mktemp("data")
    return write_images(folder / "images.parquet")
