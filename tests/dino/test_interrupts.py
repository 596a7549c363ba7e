"""Ctrl-C is noted first; only one that is meant to be a second one acts at once."""

import os
import signal

import pytest

from hf_simprune.dino import interrupts
from hf_simprune.dino.interrupts import Interrupts


def test_the_first_signal_is_noted_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as noted:
        assert noted.requested is None
        os.kill(os.getpid(), signal.SIGINT)
        assert noted.requested == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


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
