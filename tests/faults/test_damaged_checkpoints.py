"""A checkpoint whose files are not what was written is refused, and the newest intact one before it is offered."""

import random
import re
import shutil

import pytest

from hf_simprune.dino.checkpoint import check_files, find_checkpoint
from hf_simprune.errors import InputError

from .failing_disk import contents
from .tiny_trainer import build, same, tensors


FILES = ("student.safetensors", "teacher.safetensors", "optimizer.safetensors", "trainer_state.json", "manifest.json")
SEED = 20


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    trainer = build(folder, save_total_limit=None)
    trainer.train()
    return folder, tensors(trainer)


@pytest.fixture
def run(finished, tmp_path):
    """A copy to damage: checkpoints 3, 6, 9 and 12."""
    return shutil.copytree(finished[0], tmp_path / "run")


def refused(run, resume_from="latest") -> str:
    """The message; nothing in the engine may have moved."""
    trainer = build(run, weights=9)
    before = tensors(trainer)
    with pytest.raises(InputError) as caught:
        trainer.resume(resume_from)
    assert same(before, tensors(trainer)) and trainer.step == 0
    message = str(caught.value)
    assert "\n" not in message
    return message


def offered(message) -> str:
    return re.search(r"use --resume_from_checkpoint (\S+)$", message)[1]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    return bytes(changed)


WAYS = {
    "cut in half": cut,
    "emptied": lambda data: b"",
    "a byte short": lambda data: data[:-1],
    "a byte long": lambda data: data + b"\0",
    "zeros at the end": lambda data: data[:-16] + bytes(16),
    "one bit": flipped,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("way", WAYS)
def test_any_damage_is_named_and_the_checkpoint_before_it_offered(run, name, way):
    path = run / "checkpoint-12" / name
    path.write_bytes(WAYS[way](path.read_bytes()))
    message = refused(run)
    assert message.startswith(f"--resume_from_checkpoint {run}/checkpoint-12: it is damaged, ")
    assert name in message or name == "manifest.json"
    assert offered(message) == f"{run}/checkpoint-9"
    trainer = build(run, weights=9)
    assert trainer.resume(offered(message)).name == "checkpoint-9" and trainer.step == 9


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["removed", "a folder"])
def test_a_file_that_is_not_there_is_missed(run, name, how):
    path = run / "checkpoint-12" / name
    path.unlink()
    if how == "a folder":
        path.mkdir()
    message = refused(run)
    assert name in message and offered(message) == f"{run}/checkpoint-9"


def test_files_of_another_step_are_found_out(run):
    shutil.copy(run / "checkpoint-9" / "teacher.safetensors", run / "checkpoint-12" / "teacher.safetensors")
    assert "teacher.safetensors is not what was written" in refused(run)


@pytest.mark.parametrize("flips", [120, pytest.param(1500, marks=pytest.mark.faults)])
def test_one_flipped_bit_anywhere_is_refused(run, trials, flips):
    draw, checkpoint = random.Random(SEED), run / "checkpoint-12"
    for _ in range(flips):
        path = checkpoint / draw.choice(FILES)
        data = path.read_bytes()
        changed = bytearray(data)
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(InputError) as caught:
            check_files(checkpoint)
        assert offered(str(caught.value)) == f"{run}/checkpoint-9"
        path.write_bytes(data)
    assert build(run, weights=9).resume("latest") == checkpoint
    trials("flipped bits in a checkpoint", flips)


def test_damaged_earlier_ones_are_not_offered(run):
    for step in (12, 9, 6):
        (run / f"checkpoint-{step}" / "student.safetensors").write_bytes(b"")
    assert offered(refused(run)) == f"{run}/checkpoint-3"
    assert offered(refused(run, str(run / "checkpoint-6"))) == f"{run}/checkpoint-3"
    (run / "checkpoint-3" / "manifest.json").unlink()
    message = refused(run)
    assert "no earlier checkpoint is intact: put back a copy of that file" in message
    assert "manifest.json cannot be read" in refused(run, str(run / "checkpoint-3"))


def test_a_run_goes_on_from_the_offered_checkpoint_to_the_same_end(run, finished):
    (run / "checkpoint-12" / "optimizer.safetensors").write_bytes(b"")
    trainer = build(run, weights=9)
    trainer.resume(offered(refused(run)))
    trainer.train()
    assert same(tensors(trainer), finished[1])


def test_a_checkpoint_that_was_being_replaced_is_found_under_its_second_name(run, finished):
    (run / "checkpoint-12").rename(run / ".replaced-checkpoint-12")
    for wanted in ("latest", str(run / "checkpoint-12")):
        trainer = build(run, weights=9)
        trainer.resume(wanted)
        assert trainer.step == 12 and same(tensors(trainer), finished[1])
    shutil.copytree(run / "checkpoint-9", run / "checkpoint-12")
    assert find_checkpoint(run, "latest") == run / "checkpoint-12"


def test_checking_changes_nothing_on_the_disk(run):
    before = contents(run)
    (run / "checkpoint-12" / "student.safetensors").write_bytes(b"")
    refused(run)
    after = contents(run)
    assert {name for name in before if before[name] != after.get(name)} == {"checkpoint-12/student.safetensors"}
