"""Counting the trials of the fault tests, and what their runs share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..tiny_run import write_images
from .warm_runs import OFTEN, WITH_WORKERS, WarmServer, last_lines


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


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> str:
    folder: Path = tmp_path_factory.mktemp("data")
    return write_images(folder / "images.parquet")


@pytest.fixture(scope="session")
def evaluated(warm, images, tmp_path_factory) -> Path:
    """As `undisturbed`, with the options `OFTEN`."""
    folder: Path = tmp_path_factory.mktemp("evaluated")
    status = warm.run(folder / "log", output_dir=folder / "run", dataset_name_or_path=images, **OFTEN)
    assert status == 0, last_lines(folder / "log")
    return folder / "run"


@pytest.fixture(scope="session")
def undisturbed(warm, images, tmp_path_factory) -> Path:
    """The folder of a run with the options `WITH_WORKERS` that nothing happened to."""
    folder: Path = tmp_path_factory.mktemp("undisturbed")
    log = folder / "log"
    status = warm.run(log, output_dir=folder / "run", dataset_name_or_path=images, **WITH_WORKERS)
    assert status == 0, last_lines(log)
    return folder / "run"
