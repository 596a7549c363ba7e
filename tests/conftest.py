"""Fixtures shared by all tests."""

import os
import signal
from pathlib import Path

import pytest
import torch


os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the suite runs one process a core


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real weights and images; tests that need it are skipped where it is absent."""
    candidates = [os.environ.get("HF_SIMPRUNE_TEST_DATA"), Path(__file__).parents[2] / "shared" / "data"]
    for candidate in candidates:
        if candidate and Path(candidate).is_dir():
            return Path(candidate)
    pytest.skip("real weights and images are not here: set HF_SIMPRUNE_TEST_DATA to a folder that holds them")


def pytest_configure() -> None:
    """Programs that a shell starts in the background ignore Ctrl-C, and so would all that the tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
