"""A run writes over nothing that it should not."""

import pytest

from hf_simprune.dino.output_folder import check_output_dir, clear_previous_run
from hf_simprune.errors import InputError

from .make_arguments import make_arguments


class TestOutputFolder:
    @pytest.fixture
    def run_folder(self, tmp_path):
        """What a run leaves behind, and two files that are somebody else's."""
        folder = tmp_path / "run"
        for name in (
            "training/run.json",
            "training/head.safetensors",
            "checkpoint-10/trainer_state.json",
            "notes/a.md",
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
        for name in ("config.json", "model.safetensors", "README.md", "metrics.jsonl", "loss_curve.png", "mine.txt"):
            (folder / name).write_text("x")
        return folder

    @pytest.mark.parametrize("exists", [False, True])
    def test_a_new_or_empty_folder_is_fine(self, tmp_path, exists):
        folder = tmp_path / "run"
        if exists:
            folder.mkdir()
        check_output_dir(make_arguments(output_dir=str(folder)))
        assert folder.exists() is exists

    def test_a_folder_with_a_run_is_refused_with_both_ways_out(self, run_folder):
        with pytest.raises(
            InputError, match="already holds a run: .*--overwrite_output_dir.*--resume_from_checkpoint"
        ):
            check_output_dir(make_arguments(output_dir=str(run_folder)))

    def test_a_folder_with_any_file_is_refused(self, tmp_path):
        (tmp_path / "letter.txt").write_text("x")
        with pytest.raises(InputError, match=r"already holds a file \(letter.txt\)"):
            check_output_dir(make_arguments(output_dir=str(tmp_path)))

    def test_a_file_is_refused(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("x")
        with pytest.raises(InputError, match="is a file: name a folder"):
            check_output_dir(make_arguments(output_dir=str(path)))

    def test_overwriting_removes_the_run_and_nothing_else(self, run_folder):
        check_output_dir(make_arguments(output_dir=str(run_folder), overwrite_output_dir=True))
        clear_previous_run(run_folder)
        left = sorted(str(path.relative_to(run_folder)) for path in run_folder.rglob("*") if path.is_file())
        assert left == ["mine.txt", "notes/a.md"]
        assert clear_previous_run(run_folder) == []

    def test_overwriting_does_not_touch_what_no_run_wrote(self, tmp_path):
        (tmp_path / "README.md").write_text("a project")
        with pytest.raises(InputError, match="holds README.md but no training/run.json"):
            check_output_dir(make_arguments(output_dir=str(tmp_path), overwrite_output_dir=True))
        assert clear_previous_run(tmp_path) == []
        assert (tmp_path / "README.md").read_text() == "a project"

    def test_overwriting_beside_foreign_files_is_fine(self, tmp_path):
        (tmp_path / "letter.txt").write_text("x")
        check_output_dir(make_arguments(output_dir=str(tmp_path), overwrite_output_dir=True))

    def test_resuming_needs_a_checkpoint(self, run_folder, tmp_path):
        check_output_dir(make_arguments(output_dir=str(run_folder), resume_from_checkpoint="latest"))
        with pytest.raises(InputError, match="--resume_from_checkpoint latest: no checkpoint"):
            check_output_dir(make_arguments(output_dir=str(tmp_path / "new"), resume_from_checkpoint="latest"))
        with pytest.raises(InputError, match="--resume_from_checkpoint nowhere"):
            check_output_dir(make_arguments(output_dir=str(run_folder), resume_from_checkpoint="nowhere"))
