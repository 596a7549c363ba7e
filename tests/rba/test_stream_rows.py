"""Calibrating on a stream: a sample of it, held, and from there on as with a data set."""

import json
from contextlib import suppress
from pathlib import Path

import pytest

from hf_simprune.cli import main
from hf_simprune.data.decoding import decode_image
from hf_simprune.data.loading import load_split
from hf_simprune.data.streams import sample_rows
from hf_simprune.errors import InputError
from hf_simprune.evaluation.features import build_image_processor
from hf_simprune.rba.arguments import AnalyzeArguments
from hf_simprune.rba.run_images import open_images
from hf_simprune.rba.stream_rows import rows_needed

from ..data.stream_files import FORMATS, picture
from .tiny_compression import save_checkpoint


SIZES = (9, 4, 12, 5)
PROCESSOR = build_image_processor(8, [0.5] * 3, [0.25] * 3)


@pytest.fixture(params=FORMATS)
def files(request, tmp_path: Path) -> str:
    return FORMATS[request.param](tmp_path / request.param, SIZES)


def opened(files: str, **options):
    args = AnalyzeArguments(output_dir="out", dataset_name_or_path=files, streaming=True, **options)
    return open_images(args, PROCESSOR)


def content(part) -> list[bytes]:
    return [part.reader.pixels(row).tobytes() for row in part.rows]


@pytest.mark.parametrize(
    ("calibration", "evaluation", "hold_out", "rows"),
    [(500, None, True, 1500), (500, 100, True, 750), (7, 3, True, 12), (500, 9000, True, 27000), (9, 4, False, 9)],
)
def test_rows_that_are_held_suffice_and_are_bounded(calibration, evaluation, hold_out, rows):
    assert rows_needed(calibration, evaluation, hold_out) == rows
    assert rows - (rows // 3 if hold_out else 0) >= calibration


def test_the_choice_is_seeded_disjoint_and_the_same_in_every_process(files):
    options = {"calibration_images": 8, "max_eval_samples": 6}
    first, again, other = (opened(files, seed=seed, **options) for seed in (3, 3, 4))
    fitted, evaluated = content(first.training), content(first.evaluation)
    assert (len(fitted), len(evaluated)) == (8, 6)
    assert len(set(fitted + evaluated)) == 14
    assert (fitted, evaluated) == (content(again.training), content(again.evaluation))
    assert set(fitted) != set(content(other.training))
    assert "18 rows of train drawn and held in memory" in first.notes[0]
    assert first.calibration.to_dict()["streamed"]


def test_images_keep_their_labels(tmp_path: Path):
    for name in ("parquet", "webdataset"):
        images = opened(FORMATS[name](tmp_path / name, SIZES), calibration_images=8)
        for part in (images.training, images.evaluation):
            expected = [decode_image(picture(label)).numpy().tobytes() for label in part.labels.tolist()]
            assert content(part) == expected
    images = opened(FORMATS["imagefolder"](tmp_path / "imagefolder", SIZES), calibration_images=8)
    assert images.training.class_names == ("class0", "class1")


def test_a_short_stream_is_held_whole(files):
    images = opened(files)
    assert len(images.evaluation.rows) == 10 and len(images.training.rows) == 20
    assert len(set(content(images.training) + content(images.evaluation))) == sum(SIZES)


def test_a_split_of_its_own_is_drawn_from_its_own_stream(tmp_path: Path):
    files = FORMATS["parquet"](tmp_path / "train", SIZES)
    other = FORMATS["webdataset"](tmp_path / "other", (40, 6))  # begins with the 30 of the first
    images = opened(files, eval_dataset_name_or_path=other, calibration_images=12, max_eval_samples=46)
    assert len(images.training.rows) == 12 and len(images.evaluation.rows) == 46 - 12
    assert not set(content(images.training)) & set(content(images.evaluation))
    assert images.evaluated_on.startswith("34 images of other (train), without ")
    assert len(images.notes) == 3 and "train and other do not both name their classes" in images.notes[2]


def test_configuration_and_revision_are_those_of_one_data_set(tmp_path: Path, monkeypatch):
    """Of another one that is evaluated on they say nothing."""
    files = {name: FORMATS["parquet"](tmp_path / name, SIZES) for name in ("user-set", "other")}
    asked = []

    def load(name, split, config_name=None, revision=None, *words, **options):
        asked.append((Path(name).name, config_name, revision))
        return load_split(files[Path(name).name], split)

    for module in ("calibration", "run_images"):
        monkeypatch.setattr(f"hf_simprune.rba.{module}.load_split", load)
    options = {"dataset_config_name": "small", "dataset_revision": "v1", "calibration_images": 8}
    args = AnalyzeArguments(output_dir="out", dataset_name_or_path="user-set", eval_split="train", **options)
    for other, expected in ((None, ("user-set", "small", "v1")), (files["other"], ("other", None, None))):
        args.eval_dataset_name_or_path = other
        with suppress(InputError):  # the rows are all the same here
            open_images(args, PROCESSOR)
        assert asked == [("user-set", "small", "v1"), expected]
        asked.clear()


def test_an_analysis_is_that_of_the_held_rows_as_a_data_set(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    files, checkpoint = FORMATS["webdataset"](tmp_path / "set", SIZES), save_checkpoint(tmp_path / "vit")
    sample_rows(load_split(files, "train", streaming=True), ["png", "cls"], 24, seed=42).to_parquet(
        str(tmp_path / "held.parquet")
    )
    options = ["--calibration_images", "12", "--max_eval_samples", "8", "--max_span", "2", "--disable_tqdm"]
    for name, words in (("streamed", [files, "--streaming"]), ("held", [str(tmp_path / "held.parquet")])):
        folder = str(tmp_path / name)
        assert main(["analyze", checkpoint, "--output", folder, *options, "--dataset_name_or_path", *words]) == 0
        assert (name == "streamed") == ("24 rows of train drawn" in capsys.readouterr().out)
    streamed, held = (json.loads((tmp_path / name / "redundancy.json").read_text()) for name in ("streamed", "held"))
    for report in (streamed, held):
        for key in [key for key in report if "seconds" in key or key in ("calibration", "images", "data")]:
            report.pop(key)
    assert streamed == held
