"""`evaluate`: one network, or two on the same images."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_simprune.cli import main
from hf_simprune.errors import InputError
from hf_simprune.evaluation import run
from hf_simprune.evaluation.frozen import Seen
from hf_simprune.evaluation.knn import paired_bootstrap_interval
from hf_simprune.evaluation.model_files import short_name
from hf_simprune.evaluation.side_by_side import Score, Scores, match_heads, side_by_side
from hf_simprune.explore.explorer import Explorer
from hf_simprune.rba.checkpoint import load_checkpoint

from ..rba.tiny_compression import dinov2, save_checkpoint, vit
from ..tiny_run import write_images


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two networks and labelled images, one of them broken; the second prepares images otherwise."""
    folder = tmp_path_factory.mktemp("evaluate")
    other = save_checkpoint(folder / "other", vit(depth=3), seed=1)
    processor = AutoImageProcessor.from_pretrained(other, backend="pil")
    processor.image_mean = [0.2, 0.3, 0.4]
    processor.save_pretrained(other)
    data = folder / "data"
    data.mkdir()
    write_images(data / "train.parquet", 40, broken=[3])
    write_images(data / "test.parquet", 24, first=30)  # ten of which are training images
    return save_checkpoint(folder / "vit"), other, str(data)


@pytest.fixture(scope="module")
def compared(places):
    """The record, the table and what each network made of the images, of one comparison."""
    lines, seen, original = [], [], run.see

    def remember(network, images, *rest):
        seen.append((network.model, images, original(network, images, *rest)))
        return seen[-1][2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "see", remember)
        options = {"eval_split": "test", "knn_k": 5, "rounds": 2, "disable_tqdm": True}
        args = run.EvaluateArguments(
            model_name_or_path=places[0], baseline=places[1], dataset_name_or_path=places[2], **options
        )
        record = run.run_evaluate(args, lines.append)
    return record, "\n".join(lines), seen


def test_both_see_the_same_images_prepared_by_their_own_processor(compared, places):
    record, _, seen = compared
    assert [type(model).__name__ for model, *_ in seen] == ["ViTForImageClassification"] * 4
    assert seen[0][1].rows == seen[2][1].rows and seen[1][1].rows == seen[3][1].rows
    assert record["data"]["unreadable"] == 1 and record["data"]["train_images"] == 40
    assert record["images"] == 24 - 10
    assert "without 10 that are training images too" in record["data"]["evaluated_on"]
    rows = seen[1][1]
    for place, (_, images, found) in ((places[0], seen[1]), (places[1], seen[3])):
        processor = AutoImageProcessor.from_pretrained(place, backend="pil")
        pixels = processor(images=rows.reader.pixels(rows.rows[0]), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found.first, pixels)
    assert not torch.equal(seen[1][2].first, seen[3][2].first)


def test_the_numbers_are_those_of_plain_transformers(compared, places):
    record, table, seen = compared
    hits = []
    for place, side, (_, images, found) in ((places[0], "model", seen[1]), (places[1], "baseline", seen[3])):
        model = AutoModelForImageClassification.from_pretrained(place).eval()
        readable = [row for row in images.rows if images.reader.pixels_or_none(row) is not None]
        pixels = images.reader.prepare([images.reader.pixels(row) for row in readable])
        with torch.no_grad():
            classes = model(pixels).logits.argmax(1)
        assert classes.tolist() == found.classes.tolist()
        assert record[side]["parameters"] == model.num_parameters()
        hits.append(classes == found.labels)
    agreement = (seen[1][2].classes == seen[3][2].classes).double().mean().item()
    assert record["agreement"] == pytest.approx(agreement)
    assert set(record["model"]["accuracies"]) == {"k-NN", "linear probe", "own head"}
    knn = record["model"]["accuracies"]["k-NN"]
    assert knn["settings"] == {"k": 5, "temperature": 0.07, "train_images": 39} and knn["images"] == 14
    shown = f"{100 * knn['accuracy']:.1f} % [{100 * knn['interval'][0]:.1f}, {100 * knn['interval'][1]:.1f}]"
    assert re.search(rf"top-1, k-NN .*{re.escape(shown)}  .* points \[", table)


def labelled(path, labels, names=None, start=0):
    """A parquet file of tinted pictures, a tint a label; `names` are those of the labels 0, 1, …."""
    rng = np.random.default_rng(start)
    order = ["red", "green", "blue", "grey"]
    tints = dict(zip(order, [*(np.eye(3) * 140), np.zeros(3)]))
    shown = [(names or order)[label].lower() for label in labels]
    pixels = [(rng.integers(0, 100, (16, 16, 3)) + tints[name]).astype(np.uint8) for name in shown]
    kind = Value("int64") if names is None else ClassLabel(names=names)
    features = Features({"image": ImageFeature(), "label": kind})
    rows = {"image": [Image.fromarray(picture) for picture in pixels], "label": labels}
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


def evaluated(folder, train, test, **options):
    """The record and what was said."""
    lines = []
    args = run.EvaluateArguments(
        model_name_or_path=folder, dataset_name_or_path=train, eval_dataset_name_or_path=test, knn_k=3, rounds=1,
        disable_tqdm=True, token="hf_secret", **options,
    )  # fmt: skip
    return run.run_evaluate(args, lines.append), "\n".join(lines)


def test_classes_of_two_data_sets_are_matched_by_name(places, tmp_path):
    train = labelled(tmp_path / "train.parquet", [0, 1, 2] * 4, ["red", "green", "blue"])
    test = labelled(tmp_path / "test.parquet", [0, 1, 2] * 4, ["Blue", "Red", "green"], start=1)
    record, said = evaluated(places[0], train, test)
    same = labelled(tmp_path / "same.parquet", [2, 0, 1] * 4, ["red", "green", "blue"], start=1)
    expected, _ = evaluated(places[0], train, same)
    for kind in ("k-NN", "linear probe"):
        assert record["model"]["accuracies"][kind] == expected["model"]["accuracies"][kind]
        assert record["model"]["accuracies"][kind]["accuracy"] > 0.6
    assert "equal numbers" not in said and "12 images of test.parquet (train)" in said
    assert record["data"]["eval_dataset"] == test and record["data"]["eval_split"] == "train"
    assert record["options"]["knn_k"] == 3 and "token" not in record["options"]


def test_a_class_the_training_data_has_no_name_for_is_refused(places, tmp_path):
    train = labelled(tmp_path / "train.parquet", [0, 1] * 4, ["red", "green"])
    test = labelled(tmp_path / "test.parquet", [0, 1] * 2, ["green", "grey", "blue"], start=1)
    with pytest.raises(InputError, match=r"its images show 1 classes that train of .* has no name for \('grey'\)"):
        evaluated(places[0], train, test)


def test_numbers_without_names_are_compared_and_what_cannot_be_found_is_said(places, tmp_path):
    train = labelled(tmp_path / "train.parquet", [0, 1] * 4)
    record, said = evaluated(places[0], train, labelled(tmp_path / "some.parquet", [0, 1, 2, 3] * 2, start=1))
    assert "train.parquet and some.parquet do not both name their classes" in said
    assert "4 of 8 evaluation images show 2 classes that no training image does" in said
    assert record["data"]["unseen_in_training"] == {"images": 4, "classes": 2} and "Wilson" in said
    record, said = evaluated(places[0], train, labelled(tmp_path / "none.parquet", [2, 3] * 3, start=1))
    for kind in ("k-NN", "linear probe"):
        score = record["model"]["accuracies"][kind]
        assert score["accuracy"] is None and score["interval"] is None
        assert "no training image shows any of the 2 classes" in score["reason"] and f"top-1, {kind}" not in said


def test_a_network_that_guesses_stands_beside_one_whose_classes_the_labels_are():
    class Headed:
        def __init__(self, names):
            self.model = type("Model", (), {"config": type("Config", (), {"id2label": dict(enumerate(names))})})

    def found(classes):
        return Seen(torch.zeros(len(labels), 2), classes, labels, torch.zeros(1, 3, 4, 4))

    labels = torch.arange(40) % 10
    names = [f"class {index}" for index in range(10)]
    networks = [Headed(names), Headed(names), Headed(names[::-1])]
    seen = [found(torch.zeros_like(labels)), found(labels), found(torch.zeros_like(labels))]
    ruined, good, other = match_heads(networks, seen, None)
    assert torch.equal(ruined.targets, labels) and torch.equal(good.targets, labels)
    assert other.targets is None and "guessing among 10 classes" in other.reason
    assert match_heads(networks[:1], seen[:1], None)[0].targets is None


def test_bars_are_for_terminals(places, monkeypatch):
    asked = []

    def remember(network, images, size, progress):
        asked.append(progress)
        raise InputError("seen")

    monkeypatch.setattr(run, "see", remember)
    args = run.EvaluateArguments(model_name_or_path=places[0], dataset_name_or_path=places[2], eval_split="test")
    for terminal in (False, True):
        monkeypatch.setattr(run.sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        with pytest.raises(InputError, match="seen"):
            run.run_evaluate(args)
    assert asked == [None, "training images, vit"]


def test_a_model_in_the_working_folder_has_its_name(places, monkeypatch, tmp_path):
    monkeypatch.chdir(places[0])
    assert short_name(".") == "vit" and short_name("owner/model") == "owner/model"
    assert Explorer(load_checkpoint(".")).name == "vit"


def test_differences_are_model_minus_baseline_and_paired():
    torch.manual_seed(0)
    ours, theirs = torch.rand(50) < 0.8, torch.rand(50) < 0.4

    def scores(hits, seconds_of):
        score = Score(hits.double().mean().item(), (0.0, 1.0), 50, hits)
        accuracies = {"k-NN": score, "own head": Score(None, None, 50, reason="r")}
        return Scores(seconds_of, 2_000_000, 1000, 0.0, 100, accuracies)

    class Fake:
        model = type("Model", (), {"device": torch.device("cpu"), "dtype": torch.float32})()

        def forward(self, pixels):
            return pixels

    seen = [type("Seen", (), {"first": torch.zeros(1, 3, 4, 4), "labels": torch.zeros(50), "classes": None})()] * 2
    found = side_by_side([Fake(), Fake()], [scores(ours, "ours"), scores(theirs, "theirs")], seen, 3, seed=7)
    expected = paired_bootstrap_interval(ours, theirs, 7)
    assert found.differences == {"k-NN": expected} and expected[0] > 0 and found.agreement is None
    header = {row[0]: row[1:] for row in found.rows()}
    assert header["top-1, k-NN"][2].startswith(f"{100 * expected[0]:+.1f} points [") and len(found.rows()) == 5
    assert "hits" not in json.dumps(found.to_dict())


def test_a_backbone_alone_as_json_with_a_third_held_out(places, tmp_path, capfd, monkeypatch):
    folder = save_checkpoint(tmp_path / "dinov2", dinov2())
    data = f"{places[2]}/train.parquet"
    words = [folder, "--dataset", data, "--knn-k", "3", "--rounds", "1", "--disable_tqdm", "--json"]
    assert main(["evaluate", *words]) == 0
    captured = capfd.readouterr()
    record = json.loads(captured.out)
    assert (
        record["baseline"] is None
        and record["images"] + record["data"]["unreadable"] == 40 // 3
        and record["data"]["train_images"] == 27
    )
    assert "held out from the training images" in record["data"]["evaluated_on"]
    assert record["model"]["accuracies"]["own head"]["reason"] == "the network has no classification head"
    assert "No accuracy of the own head" in captured.err and record["model"]["flops"] > 0


def test_a_benchmark_score_goes_into_the_folder(places, tmp_path, monkeypatch):
    folder = save_checkpoint(tmp_path / "vit")
    words = ["--eval_split", "test", "--knn_k", "3", "--rounds", "1", "--disable_tqdm"]
    monkeypatch.setattr(run, "side_by_side", lambda *_: _evaluation())
    assert main(["evaluate", folder, "--dataset", places[2], *words, "--eval_dataset_id", "owner/benchmark"]) == 0
    [path] = (tmp_path / "vit" / ".eval_results").glob("*.yaml")
    [entry] = yaml.safe_load(path.read_text())
    assert entry["dataset"]["id"] == "owner/benchmark" and entry["value"] == 0.75
    assert main(["evaluate", "owner/model", "--dataset", places[2], *words, "--eval_dataset_id", "owner/x"]) == 2


def _evaluation():
    from hf_simprune.evaluation.side_by_side import Evaluation

    scores = {name: Score(0.75, (0.5, 1.0), 4) for name in ("k-NN", "linear probe", "own head")}
    return Evaluation(Scores("m", 1, 1, 1.0, 0, scores), None, "CPU", 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval_split", "train"], "--eval_split train is the training split too"),
        (["--train_split", "none_such"], "--train_split none_such: no such split"),
        (["--label_column", "image"], "--label_column image: no such column of class numbers"),
        (["--baseline", "/no/such"], "--baseline /no/such: there is no such folder"),
        (["--baseline", ".", "--baseline_revision", "v1"], "--baseline_revision v1: . is on this disk"),
        (["--knn_k", "100"], "--knn_k 100: there are only 27 training images"),
    ],
)
def test_bad_input_is_one_line(places, words, message, capsys):
    data = f"{places[2]}/train.parquet"
    assert main(["evaluate", places[0], "--dataset", data, "--disable_tqdm", *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
