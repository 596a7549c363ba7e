"""Data that cannot be read any more: every process stops after the same step, all is saved, and nothing is read twice.

Two processes read a stream, which the second one loses for a while; what each has read is written down.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
from pyarrow import ArrowInvalid

from hf_simprune.data.streams import StreamError
from hf_simprune.dino.data import BadImageError
from hf_simprune.dino.feed import Fetched
from hf_simprune.dino.worker_deaths import WorkerDied
from hf_simprune.errors import EvaluationError, InputError, TrainingError

from ..data.stream_files import write_parquet_shards
from ..dino.conftest import tiny_schedules
from ..dino.on_ranks import on_ranks
from .tiny_streams import GLOBAL_BATCH, KEYS, SIZES, streamed
from .tiny_trainer import STEPS, build, same, tensors, untimed


FAILURES = {
    "a file": OSError(5, "Input/output error"),
    "a shard": StreamError("shard 2 of the stream cannot be read"),
    "an image": BadImageError("image 17 cannot be read"),
    "a worker": WorkerDied("a data loader's worker (process 7) is killed by signal"),
    "no words": OSError(),
    "memory": MemoryError("out of memory"),
    "shared memory": RuntimeError("unable to mmap 65536 bytes: Cannot allocate memory (12)"),
    "a table": ArrowInvalid("Parquet magic bytes not found in footer"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_run_that_cannot_read_on_says_why_and_has_saved_its_last_step(tmp_path, what):
    error = FAILURES[what]

    def fail(step):
        if step == 5:
            raise error

    with pytest.raises(TrainingError) as caught:
        build(tmp_path / "run", fail).train()
    message = str(caught.value)
    assert message.startswith(f"stopped at step 4: {error if str(error) else 'OSError()'}. ") and "\n" not in message
    assert "last good step is in checkpoint-4; run the same command with --resume_from_checkpoint latest" in message
    resumed = build(tmp_path / "run", weights=9)
    assert resumed.resume("latest").name == "checkpoint-4" and resumed.step == 4
    assert caught.value.__cause__ is error


def test_a_workers_failure_is_told_by_its_last_line():
    error = RuntimeError(
        "Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback …\nMemoryError: full\n"
    )
    assert Fetched((), 0.0, error).failure == "MemoryError: full"


def test_an_evaluation_whose_images_cannot_be_read_costs_its_numbers_only(tmp_path, capsys):
    def evaluate(step, stopped):
        if step == 6:
            raise EvaluationError("of 40 images that vote 0 can be read")
        return {"knn_accuracy": step / 100}

    trainer = build(tmp_path / "run", evaluate=evaluate, knn_every=3)
    trainer.train()
    assert [line["step"] for line in untimed(tmp_path / "run") if "knn_accuracy" in line] == [0, 3, 9, 12]
    assert "step 6 was not evaluated: of 40 images that vote 0 can be read" in capsys.readouterr().out


def test_a_checkpoint_of_more_steps_than_are_wanted_is_evaluated_and_no_data_is_asked_for(tmp_path):
    build(tmp_path / "run").train()
    asked = []
    trainer = build(tmp_path / "run", asked.append, evaluate=lambda step, stopped: {"knn_accuracy": 0.5})
    trainer.resume("latest")
    trainer.schedules = tiny_schedules(STEPS - 4)
    trainer.train()
    assert asked == [] and untimed(tmp_path / "run")[-1] == {"step": STEPS, "knn_accuracy": 0.5}


def test_a_defect_in_the_code_is_not_taken_for_one_of_the_data(tmp_path):
    def fail(step):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build(tmp_path / "run", fail).train()


LAST = 5  # step after which the second process loses its data


def _rank(rank: int, folder: Path, files: str) -> None:
    """Each process writes down what it has read, what it was told and whether both runs ended alike."""

    def trained(trainer):
        said = None
        try:
            trainer.train()
        except TrainingError as error:
            said = str(error)
        found = tensors(trainer)
        trainer.engine.model = trainer.engine.dual  # a wrapper that outlives its group hangs
        trainer.accelerator.free_memory()
        return found, trainer.source.ids, said

    straight, whole, _ = trained(streamed(folder / "straight", files, bad_at=LAST * 2 if rank else None))
    faults = {"lost_at": LAST + 1, "bad_at": LAST * 2} if rank else {}
    _, before, said = trained(streamed(folder / "parts", files, **faults))
    resumed = streamed(folder / "parts", files, weights=9)
    name = resumed.resume("latest").name
    end, after, _ = trained(resumed)
    told = {"whole": whole, "before": before, "after": after, "said": said, "resumed": name}
    told |= {"equal": same(straight, end), "bad": sorted(resumed.bad_indices)}
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder, the stream and what each of two processes tells."""
    folder = tmp_path_factory.mktemp("two")
    files = write_parquet_shards(folder / "set", SIZES)
    on_ranks(2, _rank, folder, files)
    return folder, files, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


class TestOfTwoProcesses:
    def test_both_end_with_the_words_of_the_one_that_failed_and_with_one_checkpoint(self, two):
        folder, _, told = two
        assert told[0]["said"] == told[1]["said"]
        wanted = f"stopped at step {LAST}: [Errno 5] the share is gone. The network of the last good step is in "
        assert told[0]["said"].startswith(f"{wanted}checkpoint-{LAST}; ")
        assert [one["resumed"] for one in told] == [f"checkpoint-{LAST}"] * 2
        assert all(len(one["before"]) == LAST * GLOBAL_BATCH // 2 for one in told)

    def test_resumed_they_read_what_they_had_not_read_and_end_bit_equal(self, two, trials):
        folder, _, told = two
        for one in told:
            assert one["before"] + one["after"] == one["whole"] and one["equal"]
        epoch = [key for one in told for key in one["whole"][: len(KEYS) // 2]]
        assert sorted(epoch) == KEYS
        assert untimed(folder / "parts") == untimed(folder / "straight")
        trials("streams lost by one of two processes, saved, resumed bit-equal", 1)

    def test_an_image_that_one_of_them_met_between_two_lines_of_the_log_is_known_to_all(self, two):
        folder, _, told = two
        state = json.loads((folder / "parts" / "checkpoint-8" / "trainer_state.json").read_text())
        assert state["bad_indices"] == ["3 of shard 1"]
        assert [one["bad"] for one in told] == [["3 of shard 1"]] * 2
        assert [line["bad_images"] for line in untimed(folder / "parts")] == [0, 1, 1]

    def test_one_process_cannot_read_on_in_the_middle_of_the_epoch(self, two):
        folder, files, _ = two
        with pytest.raises(InputError, match="written by 2, .*launch 2, or use --allow_schedule_change to go on at"):
            streamed(folder / "parts", files).resume(str(folder / "parts" / "checkpoint-8"))

    def test_it_may_leave_out_the_rest_of_the_epoch_and_nothing_else(self, two, capsys):
        folder, files, told = two
        checkpoint = folder / "straight" / "checkpoint-4"  # 16 of 28 are read, all of the first epoch
        alone = streamed(folder / "straight", files, weights=9, allowed=True)
        alone.resume(str(checkpoint))
        assert "--allow_schedule_change, so it goes on at the start of epoch 1" in capsys.readouterr().out
        (place,) = alone.source_state["places"]
        assert (place["epoch"], place["taken"]) == (1, 0)
        seen = Counter(key for one in told for key in one["whole"][:8])
        alone.schedules = tiny_schedules(4 + 7)
        alone.train()
        assert sorted(alone.source.ids) == KEYS
        seen.update(alone.source.ids)
        assert sorted(seen.values()) == [1] * 12 + [2] * 16
        assert alone.source_state["places"][0]["epoch"] == 1
