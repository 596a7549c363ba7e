"""Fixtures shared by all tests."""

import os
import signal
import sys
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


@pytest.fixture(autouse=True)
def no_copies(monkeypatch) -> None:
    """No launcher sends a signal to the tests' own process a second time, so a run need not wait for that."""
    if "hf_simprune.dino.interrupts" in sys.modules:
        monkeypatch.setattr("hf_simprune.dino.interrupts.SAME_SIGNAL_SECONDS", 0.05)


def pytest_configure() -> None:
    """Programs that a shell starts in the background ignore Ctrl-C, and so would all that the tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
