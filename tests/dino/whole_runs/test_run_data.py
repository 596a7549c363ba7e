"""What a run makes of unreadable images and of labels that are missing."""

import json

import pyarrow as pa
import pytest

from hf_simprune.errors import InputError, TrainingError

from ...tiny_run import NUM_IMAGES, metrics, write_images


class TestBadImages:
    broken = (3, 17)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_are_counted_and_named_and_the_run_ends_well(self, train, tmp_path, capsys, workers):
        data = write_images(tmp_path / "broken.parquet", broken=self.broken)
        folder = train(dataset_name_or_path=data, dataloader_num_workers=workers)
        out = capsys.readouterr().out
        for index in self.broken:
            assert out.count(f"image {index} cannot be read") == 1
        last = [record for record in metrics(folder) if "loss" in record][-1]
        assert last["step"] == 6 and last["bad_images"] == 2
        assert json.loads((folder / "training/run.json").read_text())["bad_images"] == [3, 17]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_stop_the_run_if_asked_to(self, train, tmp_path, workers):
        data = write_images(tmp_path / "broken.parquet", broken=[17])
        with pytest.raises(TrainingError, match=r"stopped at step \d: image 17 cannot be read: .* in checkpoint-\d; "):
            train(dataset_name_or_path=data, on_bad_image="error", dataloader_num_workers=workers)

    def test_are_counted_in_a_stream(self, train, tmp_path):
        data = write_images(tmp_path / "broken.parquet", broken=[17])
        folder = train(dataset_name_or_path=data, streaming=True, max_steps=5)
        assert metrics(folder)[-2]["bad_images"] == 1


class TestLabels:
    def test_images_without_a_label_are_trained_on_but_not_classified(self, train, tmp_path, capsys):
        labels = [None if i < 10 else -1 if i < 15 else i % 4 for i in range(NUM_IMAGES)]
        data = write_images(tmp_path / "partly.parquet", label=labels)
        folder = train(dataset_name_or_path=data, max_steps=2)
        out = capsys.readouterr().out
        assert f"{NUM_IMAGES} images, global batch" in out
        assert "k-NN: 3 training images, drawn at random, classified by 22 others" in out
        assert "knn_accuracy" in metrics(folder)[0]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_column_of_nothing_turns_the_knn_off(self, train, tmp_path, capsys, streaming):
        data = write_images(tmp_path / "none.parquet", label=pa.array([None] * NUM_IMAGES, pa.int64()))
        folder = train(dataset_name_or_path=data, max_steps=2, streaming=streaming)
        assert "k-NN: off" in capsys.readouterr().out
        assert not any("knn_accuracy" in record for record in metrics(folder))
        assert "Weighted k-NN" not in (folder / "README.md").read_text()

    def test_words_turn_the_knn_off(self, train, tmp_path, capsys):
        data = write_images(tmp_path / "words.parquet", label=[f"class {i % 4}" for i in range(NUM_IMAGES)])
        train(dataset_name_or_path=data, max_steps=2)
        assert "k-NN: off, the data set has no column of class numbers" in capsys.readouterr().out

    def test_a_benchmark_that_would_get_no_score_is_refused(self, train, tmp_path):
        data = write_images(tmp_path / "words.parquet", label=["a"] * NUM_IMAGES)
        with pytest.raises(InputError, match="--eval_dataset_id some/set: there will be no score for it: k-NN: off"):
            train("never", dataset_name_or_path=data, eval_dataset_id="some/set", eval_split="train")
        assert not (tmp_path / "never").exists()

    def test_too_few_neighbours_stop_before_anything_is_written(self, train, tmp_path):
        with pytest.raises(InputError, match="--knn_k 37: there are only 36 labelled images"):
            train("never", knn_k=37)
        assert not (tmp_path / "never").exists()
