"""Ctrl-C is noted first; only one that is meant to be a second one acts at once."""

import os
import signal
import subprocess
import threading
import time

import pytest

from hf_simprune.dino import interrupts
from hf_simprune.dino.interrupts import Interrupts, outlive_interrupts


@pytest.fixture(autouse=True)
def no_copies():
    """Here they are sent."""


def test_the_first_signal_is_noted_and_handlers_come_back(monkeypatch):
    monkeypatch.setattr(interrupts, "SAME_SIGNAL_SECONDS", 0.05)
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as noted:
        assert noted.requested is None
        os.kill(os.getpid(), signal.SIGINT)
        assert noted.requested == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


def test_a_copy_that_arrives_when_all_is_saved_changes_nothing():
    late = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    with Interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
        late.start()
    assert not late.is_alive()  # it would have ended the tests
    late.join()


def test_a_launchers_copy_of_the_same_signal_changes_nothing():
    with Interrupts() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert noted.requested == signal.SIGINT


def test_a_later_one_acts_at_once(monkeypatch):
    monkeypatch.setattr(interrupts, "SAME_SIGNAL_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt), Interrupts() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        assert noted.requested == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


class TestWorkers:
    """Of a loader; signals from elsewhere are sent by a process of their own."""

    @pytest.fixture
    def worker(self):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            outlive_interrupts(0)
            os.write(writer, b"ready")
            time.sleep(60)
            os._exit(0)
        os.read(reader, 5)
        yield pid
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)

    def ended(self, pid, seconds=0.0):
        deadline = time.monotonic() + seconds
        while True:
            found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None or time.monotonic() > deadline:
                return found is not None
            time.sleep(0.01)

    def test_what_reaches_the_whole_group_is_left_to_the_training_process(self, worker):
        for name in ("INT", "TERM", "TERM"):
            subprocess.run(["kill", f"-{name}", str(worker)], check=True)
        assert not self.ended(worker, 0.5)

    def test_the_training_process_ends_them_at_once_even_after_that(self, worker):
        subprocess.run(["kill", "-TERM", str(worker)], check=True)
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGTERM)  # two may arrive as one
        assert self.ended(worker, 20)

    def test_a_later_one_from_elsewhere_ends_them(self, worker):
        subprocess.run(["kill", "-TERM", str(worker)], check=True)
        time.sleep(interrupts.SAME_SIGNAL_SECONDS + 0.2)
        subprocess.run(["kill", "-TERM", str(worker)], check=True)
        assert self.ended(worker, 20)
