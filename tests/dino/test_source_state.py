"""Where a source of crops stands travels with every checkpoint and goes back to the process it came from."""

import json
from itertools import count

import pytest
import torch

from hf_simprune.dino.manifest import write_manifest
from hf_simprune.dino.trainer import DinoTrainer, LoopSettings
from hf_simprune.errors import InputError, TrainingError

from .conftest import FixedViews, tiny_dual, tiny_engine, tiny_schedules, tiny_views
from .image_files import one_line_naming


class CountingViews(FixedViews):
    """Goes on from its state, whatever step it is asked for; step `broken` has a crop that is not a number."""

    def __init__(self, broken=None):
        super().__init__()
        self.given, self.broken = 0, broken

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]

    def batches(self, start):
        for step in count(self.given):
            self.given = step + 1
            views = tiny_views(step, dtype=torch.float32)
            if step == self.broken:
                views.global_crops[0, 0, 0, 0] = torch.nan
            yield [views]


def trainer(folder, source, total=8):
    dual = tiny_dual(dtype=torch.float32)
    settings = LoopSettings(folder, 3, logging_steps=1, save_steps=3, save_total_limit=None, disable_tqdm=True)
    return DinoTrainer(tiny_engine(dual), tiny_schedules(total), source, settings)


def states(folder):
    return {
        int(path.parent.name.partition("-")[2]): json.loads(path.read_text())["source"]
        for path in folder.glob("checkpoint-*/trainer_state.json")
    }


def rewrite(path, state):
    path.write_text(json.dumps(state))
    write_manifest(path.parent)


def test_a_checkpoint_holds_the_state_of_every_process_after_its_step(tmp_path):
    trainer(tmp_path, CountingViews()).train()
    assert states(tmp_path) == {3: [{"given": 3}], 6: [{"given": 6}], 8: [{"given": 8}]}


def test_a_resumed_run_goes_on_from_the_state_and_not_from_the_step(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    straight = trainer(whole, CountingViews())
    straight.train()
    trainer(parts, CountingViews()).train()
    resumed = trainer(parts, CountingViews())
    resumed.resume(str(parts / "checkpoint-3"))
    assert resumed.source.given == 3
    resumed.train()
    for name, tensor in straight.engine.dual.state_dict().items():
        assert torch.equal(tensor, resumed.engine.dual.state_dict()[name]), name
    assert states(parts) == states(whole)


def test_a_step_that_was_not_taken_does_not_count_as_consumed(tmp_path):
    with pytest.raises(TrainingError, match="step 4"):
        trainer(tmp_path, CountingViews(broken=4)).train()
    assert states(tmp_path)[4] == [{"given": 4}]


def test_states_of_more_processes_than_there_are_now_are_refused(tmp_path):
    trainer(tmp_path, CountingViews(), total=3).train()
    path = tmp_path / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    rewrite(path, state | {"source": [{"given": 3}, {"given": 3}]})
    with pytest.raises(InputError) as error:
        trainer(tmp_path, CountingViews(), total=3).resume("latest")
    one_line_naming(error, "1 process(es)", "written by 2", "launch 2")
    rewrite(path, state | {"source": [{}, {}]})  # a data set's order is the same for any number
    trainer(tmp_path, FixedViews(), total=3).resume("latest")
