"""Messages that cannot be written end no run: the disk of their file may be full, or nobody reads them any more."""

import errno
import io
import os
import sys

import pytest

from hf_simprune.lasting_output import lasting_output

from .warm_runs import OFTEN, assert_equal_runs


class Broken(io.StringIO):
    """Takes a few words, then fails in every call for a while."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code, self.works = code, True

    def write(self, text: str) -> int:
        self._fail()
        return super().write(text)

    def flush(self) -> None:
        self._fail()

    def _fail(self) -> None:
        if not self.works:
            raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EPIPE])
def test_what_cannot_be_written_is_dropped_and_what_can_is_not(monkeypatch, code):
    for name in ("stdout", "stderr"):
        stream = Broken(code)
        monkeypatch.setattr(sys, name, stream)
        with lasting_output():
            inside = getattr(sys, name)
            print("before", file=inside, flush=True)
            stream.works = False
            print("during", file=inside, flush=True)
            inside.writelines(["during\n"])
            stream.works = True
            print("after", file=inside, flush=True)
            assert inside.isatty() is False and inside.encoding == stream.encoding
        assert getattr(sys, name) is stream
        assert stream.getvalue() == "before\nafter\n"


@pytest.mark.parametrize("end", ["full disk", "closed pipe"])
def test_a_run_whose_output_fails_ends_as_any_other(warm, images, evaluated, end, tmp_path, trials):
    """Its prints, its progress bars, the k-NN's too."""
    output = "/dev/full"
    if end == "closed pipe":
        output = tmp_path / "pipe"
        os.mkfifo(output)
        reader = os.open(output, os.O_RDONLY | os.O_NONBLOCK)
    options = {**OFTEN, "output_dir": tmp_path / "run", "dataset_name_or_path": images}
    pid = warm.start(output, **options, disable_tqdm=False)
    if end == "closed pipe":
        while True:  # until it has begun to write
            try:
                if os.read(reader, 1):
                    break
            except BlockingIOError:
                continue
        os.close(reader)
    assert warm.wait(pid) == 0
    assert_equal_runs(evaluated, tmp_path / "run")
    trials(f"runs whose output fails ({end})", 1)
