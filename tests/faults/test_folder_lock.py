"""One run at a time writes into a folder, and whatever ends a run, the next one can begin at once."""

import errno
import os
import signal
import time
from unittest.mock import patch

import pytest

from hf_simprune.dino.folder_lock import LOCK_FILE, FolderLock, check_unlocked
from hf_simprune.dino.output_folder import clear_previous_run
from hf_simprune.errors import InputError

from .failing_disk import contents
from .warm_runs import WITH_WORKERS, last_lines, processes_of, wait_for_steps


@pytest.fixture
def process():
    """`process(action)` runs an action in a fork that then waits for ever; returns its id when the action is done."""
    started = []

    def start(action):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            action()
            os.write(writer, b".")
            time.sleep(600)
            os._exit(0)
        os.close(writer)
        started.append(pid)
        assert os.read(reader, 1) == b"."
        os.close(reader)
        return pid

    yield start
    for pid in started:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def refused(folder, pid):
    for ask in (check_unlocked, FolderLock().take):
        with pytest.raises(InputError) as caught:
            ask(folder)
        message = str(caught.value)
        assert f"--output_dir {folder}: a run is at work there (process {pid}," in message and "\n" not in message


def free(folder):
    check_unlocked(folder)
    lock = FolderLock()
    assert lock.take(folder) is None
    lock.release()


def test_a_folder_that_another_process_has_is_refused_by_its_id_until_that_is_killed(tmp_path, process):
    free(tmp_path)  # which leaves the file
    lock = FolderLock()
    pid = process(lambda: lock.take(tmp_path))
    refused(tmp_path, pid)
    refused(tmp_path, pid)  # asking does not end it
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    free(tmp_path)


def test_a_fork_of_the_run_does_not_keep_the_folder(tmp_path, process):
    lock = FolderLock()
    lock.take(tmp_path)
    process(lambda: refused(tmp_path, os.getppid()))
    lock.release()
    free(tmp_path)


def test_the_file_stays_when_a_run_is_overwritten(tmp_path):
    lock = FolderLock()
    lock.take(tmp_path)
    file = (tmp_path / LOCK_FILE).stat().st_ino
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "run.json").write_text("{}")
    assert clear_previous_run(tmp_path) == ["training"]
    assert (tmp_path / LOCK_FILE).stat().st_ino == file
    lock.release()


def test_a_full_disk_does_not_keep_the_lock_from_holding(tmp_path, process):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def take():
        with patch("os.write", full):
            FolderLock.take(lock, tmp_path)

    lock = FolderLock()
    process(take)
    with pytest.raises(InputError, match="a run is at work there .another process,"):
        check_unlocked(tmp_path)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / LOCK_FILE).touch()
    with patch("os.open", side_effect=PermissionError(errno.EACCES, "Permission denied")):
        with pytest.raises(
            InputError, match=f"--output_dir {tmp_path}: .lock in it cannot be read: Permission denied"
        ):
            check_unlocked(tmp_path)


def test_asking_changes_nothing(tmp_path):
    check_unlocked(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / LOCK_FILE).write_text("12345\n")  # left by a run that is over
    check_unlocked(tmp_path)
    assert contents(tmp_path) == {LOCK_FILE: b"12345\n"}


def test_a_second_run_is_refused_and_the_first_ones_workers_keep_nobody_out(warm, images, tmp_path, trials):
    folder = tmp_path / "run"
    options = {**WITH_WORKERS, "dataset_name_or_path": images, "output_dir": folder}
    first = warm.start(tmp_path / "first.log", **options)
    try:
        wait_for_steps(folder, 1)
        os.killpg(first, signal.SIGSTOP)  # so that its workers do not notice what follows
        before = contents(folder)
        for again in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
            log = tmp_path / "refused.log"
            log.unlink(missing_ok=True)
            assert warm.run(log, **options, **again) == 2, last_lines(log)
            assert f"a run is at work there (process {first}," in log.read_text()
        assert contents(folder) == before
        os.kill(first, signal.SIGKILL)
        assert warm.wait(first) == -signal.SIGKILL
        assert len(processes_of(first)) == 2
        options |= {"max_steps": 1, "dataloader_num_workers": 0}
        log = tmp_path / "next.log"
        assert warm.run(log, **options, overwrite_output_dir=True) == 0, last_lines(log)
        assert len(processes_of(first)) == 2
    finally:
        os.killpg(first, signal.SIGKILL)
    trials("second runs in a folder at work, refused", 3)
