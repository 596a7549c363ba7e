"""A checkpoint's state is believed only where every field of it is what a trainer writes."""

import copy
import json
import math
from dataclasses import asdict

import pytest

from hf_simprune.data.streams import START
from hf_simprune.dino.trainer_state import wrong_field
from hf_simprune.dino.window import Window


PLACE = START | {"block": 2, "taken": 3, "open": [[0, 7], [1, 2]]}
STATE = {
    "step": 4,
    "batches_seen": 5,
    "source": [{"workers": 1, "layout": {}, "turn": 0, "places": [PLACE]}],
    "skipped_in_a_row": 1,
    "bad_indices": [3, 17],
    "window": asdict(Window(2, 8.5, 3, 0.2, 0.1, {"koleo_loss": math.nan})),
    "monitor": {"uniform_steps": 0, "one_prototype_steps": 3},
    "scaler": {
        "scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 7,
    },
    "identity": {"--seed": 42},
    "unwritten_metrics": ['{"step": 4, "loss": 1.5}\n'],
}  # fmt: skip
SOUND = {
    "source": ([{}], [{}, {}]),
    "bad_indices": ([], ["3 of shard 0"]),
    "scaler": (None, {}),
    "unwritten_metrics": ([],),
}
WRONG = {
    "step": (-1, 1.0, True, "1", None, 2**62),
    "source": ([], {}, [3], [{"places": {}}], [{"places": []}], [{"places": [PLACE | {"open": [[1]]}]}],
               [{"places": [PLACE | {"turn": -1}]}], [{"places": [{"epoch": 0}]}]),
    "bad_indices": ([3, "3"], [None], [True], {}, "3"),
    "window": ({}, asdict(Window()) | {"loss": "1"}, asdict(Window()) | {"steps": 0.5}, asdict(Window()) | {"x": 1},
               asdict(Window()) | {"parts": []}, asdict(Window()) | {"parts": {"koleo_loss": None}}),
    "monitor": ({}, {"uniform_steps": 0}, {"uniform_steps": 0, "one_prototype_steps": -1}, []),
    "scaler": ({"scale": 1.0}, STATE["scaler"] | {"scale": "1"}, [], 1),
    "identity": ([], None),
    "unwritten_metrics": (["x\n"], ["{}\n"], ['{"step": 4}'], ['{"step": "4"}\n'], ["\ud800\n"], [3], "[]"),
}  # fmt: skip


def test_what_a_trainer_writes_is_right():
    assert wrong_field(json.loads(json.dumps(STATE))) is None
    for name, values in SOUND.items():
        for value in values:
            assert wrong_field(STATE | {name: value}) is None, (name, value)


@pytest.mark.parametrize("name", STATE)
def test_a_field_that_is_missing_or_something_else_is_named(name):
    without = copy.deepcopy(STATE)
    del without[name]
    assert wrong_field(without) == name
    for value in WRONG.get(name, WRONG["step"]):
        assert wrong_field(STATE | {name: value}) == name, value


def test_something_else_than_an_object_is_no_state():
    for value in ([], None, 3, "state"):
        assert wrong_field(value) == "the whole of it"
