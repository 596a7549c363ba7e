"""The k-NN during training: which images it takes, and that its numbers are those of a naive one."""

import io
from contextlib import nullcontext
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from hf_simprune.dino.online_knn import LabelledImages, OnlineKnn, drawn, hold_out
from hf_simprune.dino.run_data import labelled_images, open_data
from hf_simprune.errors import EvaluationError, InputError
from hf_simprune.evaluation.features import build_image_processor
from hf_simprune.models.architectures import build_backbone

from ..tiny_run import naive_knn, png
from .conftest import TINY
from .make_arguments import make_arguments


K, TEMPERATURE = 5, 0.07


def picture(row: int) -> Image.Image:
    return Image.open(io.BytesIO(png(row)))


def labelled(rows, image=picture) -> LabelledImages:
    rows = list(rows)
    return LabelledImages(image, rows, torch.tensor([row % 4 for row in rows]))


def losing(rows):
    """As `picture`, but these rows cannot be read."""

    def image(row):
        if row in rows:
            raise OSError(116, "Stale file handle")
        return picture(row)

    return image


def knn(network, processor, bank, queries, **options) -> OnlineKnn:
    return OnlineKnn(
        network, processor, bank, queries, K, TEMPERATURE, Accelerator(cpu=True), progress=False, **options
    )


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_backbone("vit_micro", image_size=16, patch_size=4, **TINY)


@pytest.fixture(scope="module")
def processor():
    return build_image_processor(16, [0.5] * 3, [0.25] * 3)


class TestDrawing:
    def test_all_are_taken_where_there_is_no_limit_or_it_is_not_reached(self):
        assert drawn(5, None) == drawn(5, 5) == drawn(5, 9) == [0, 1, 2, 3, 4]

    def test_a_draw_is_ascending_without_repeats_and_always_the_same(self):
        chosen = drawn(1000, 200)
        assert chosen == sorted(set(chosen)) and len(chosen) == 200 and chosen[-1] < 1000
        assert chosen == drawn(1000, 200)

    @pytest.mark.parametrize("labels", ["sorted", "in turn"])
    def test_no_class_is_missed_whatever_the_order_of_the_data_set(self, labels):
        classes = [row // 100 if labels == "sorted" else row % 10 for row in range(1000)]
        counts = torch.bincount(torch.tensor([classes[row] for row in drawn(1000, 200)]), minlength=10)
        assert counts.min() >= 8

    def test_a_tenth_is_held_out_and_the_rest_votes(self):
        bank, queries = hold_out(labelled(range(100, 141)))
        assert (len(bank), len(queries)) == (36, 5)
        assert sorted(bank.rows + queries.rows) == list(range(100, 141))
        for part in (bank, queries):
            assert part.labels.tolist() == [row % 4 for row in part.rows]


class TestRowsWithLabels:
    @pytest.fixture
    def path(self, tmp_path):
        images = [{"bytes": png(i), "path": None} for i in range(6)]
        pq.write_table(pa.table({"image": images, "label": [2, None, 0, -1, 1, 2]}), tmp_path / "rows.parquet")
        return str(tmp_path / "rows.parquet")

    def test_unknown_classes_are_left_out(self, path):
        images = labelled_images(Dataset.from_parquet(path), "image", "label")
        assert images.rows == [0, 2, 4, 5]
        assert images.labels.tolist() == [2, 0, 1, 2]
        assert images.image(4).convert("RGB").tobytes() == picture(4).tobytes()

    def test_class_names_count_as_numbers(self):
        features = Features({"image": Value("binary"), "label": ClassLabel(names=["cat", "dog"])})
        rows = Dataset.from_dict({"image": [png(0), png(1)], "label": ["dog", "cat"]}, features=features)
        assert labelled_images(rows, "image", "label").labels.tolist() == [1, 0]


class TestAccuracy:
    def test_equals_a_naive_knn_on_both_kinds_of_features(self, network, processor):
        bank, queries = labelled(range(40)), labelled(range(40, 60))
        found = knn(network, processor, bank, queries, batch_size=7)(0)
        pictures = [picture(row) for row in range(60)]
        network.eval()
        with torch.no_grad():
            tokens = network(**processor(images=pictures, return_tensors="pt")).last_hidden_state
        features = {"knn_accuracy": tokens[:, 0], "knn_accuracy_patch_mean": tokens[:, 1:].mean(dim=1)}
        assert found.pop("knn_images") == 20 and found.keys() == features.keys()
        for key, values in features.items():
            predicted = naive_knn(values[:40], bank.labels.tolist(), values[40:], K, TEMPERATURE)
            expected = sum(p == label for p, label in zip(predicted, queries.labels.tolist())) / 20
            assert found[key] == pytest.approx(expected)
        assert 0 < found["knn_accuracy"] < 1

    def test_unreadable_images_leave_with_their_labels(self, network, processor):
        def broken(row):
            if row in (0, 3, 41):
                raise OSError("broken")
            return picture(row)

        def accuracy(bank, queries, image):
            found = knn(network, processor, labelled(bank, image), labelled(queries, image))(0)
            assert found["knn_images"] == 19
            return found["knn_accuracy"], found["knn_accuracy_patch_mean"]

        rows, queries = [r for r in range(40) if r not in (0, 3)], [r for r in range(40, 60) if r != 41]
        assert accuracy(range(40), range(40, 60), broken) == accuracy(rows, queries, picture)

    def test_how_many_could_not_be_read_is_told_and_nothing_where_all_could(self, network, processor):
        lost = {2, 3, 41}
        found = knn(network, processor, labelled(range(40), losing(lost)), labelled(range(40, 60), losing(lost)))(0)
        assert found["knn_unreadable"] == 3
        assert "knn_unreadable" not in knn(network, processor, labelled(range(40)), labelled(range(40, 60)))(0)

    @pytest.mark.parametrize(
        ("lost", "words"),
        [
            (range(60), "vote 0 can be read"),
            (range(36), f"vote 4 can be read ({K} neighbours"),
            (range(40, 60), "of 20 to classify 0"),
        ],
    )
    def test_too_few_readable_images_are_an_error_of_the_evaluation_and_no_bad_input(
        self, network, processor, lost, words
    ):
        images = losing(set(lost))
        with pytest.raises(EvaluationError) as error:
            knn(network, processor, labelled(range(40), images), labelled(range(40, 60), images))(0)
        assert words in str(error.value)

    def test_it_is_given_up_at_the_batch_in_which_that_is_asked_for(self, network, processor):
        read = []

        def image(row):
            read.append(row)
            return picture(row)

        evaluation = knn(network, processor, labelled(range(40), image), labelled(range(40, 60), image), batch_size=8)
        answers = iter([False, False, True])
        assert evaluation(0, lambda: next(answers)) is None
        assert read == list(range(16))

    @pytest.mark.parametrize("count", [1, 16, 17, 31, 32])
    def test_processes_with_unequal_shares_ask_equally_often_whether_to_stop(self, network, processor, count):
        """Two processes; what each asks is a collective operation."""
        asked = []
        for rank in range(2):
            evaluation = knn(network, processor, labelled(range(40)), labelled(range(4)), batch_size=8)
            shared = SimpleNamespace(process_index=rank, num_processes=2, autocast=nullcontext, device="cpu")
            evaluation.accelerator = shared
            questions = []
            evaluation._features(labelled(range(count), losing({rank})), lambda: bool(questions.append(0)))
            asked.append(len(questions))
        assert asked[0] == asked[1] == -(-count // 16)

    def test_the_network_is_left_as_it_was(self, network, processor):
        network.train()
        network.layers[0].eval()
        modes = [module.training for module in network.modules()]
        before = {name: value.clone() for name, value in network.state_dict().items()}
        knn(network, processor, labelled(range(20)), labelled(range(4)))(0)
        assert [module.training for module in network.modules()] == modes
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    def test_more_neighbours_than_images_are_refused(self, network, processor):
        with pytest.raises(InputError, match="--knn_k 5: there are only 4 labelled images"):
            knn(network, processor, labelled(range(4)), labelled(range(4)))


def test_classes_of_the_evaluation_set_are_matched_by_name(tmp_path):
    def written(name, classes, labels):
        kind = ClassLabel(names=classes) if classes else Value("int64")
        features = Features({"image": ImageFeature(), "label": kind})
        rows = {"image": [picture(row) for row in range(len(labels))], "label": labels}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / name)
        return str(tmp_path / name)

    train = written("train.parquet", ["ant", "bee", "cat"], [0, 1, 2, 0])
    other = written("other.parquet", ["Bee", "dog", "ant"], [0, 2, 1])
    data = open_data(make_arguments(dataset_name_or_path=train, eval_dataset_name_or_path=other))
    assert data.queries.labels.tolist() == [0, 2, 1]  # bee, ant, dog
    assert data.bank.labels.tolist() == [2, 0, 5, 2]  # ant, bee, cat, ant
    assert not any(note.startswith("labels: ") for note in data.notes)
    unnamed = written("unnamed.parquet", None, [0, 2, 1])
    data = open_data(make_arguments(dataset_name_or_path=train, eval_dataset_name_or_path=unnamed))
    assert data.bank.labels.tolist() == [0, 1, 2, 0]
    assert data.notes[-1].startswith("labels: train.parquet and unnamed.parquet do not both name their classes")
    data = open_data(make_arguments(dataset_name_or_path=unnamed, eval_split="train"))
    assert not any(note.startswith("labels: ") for note in data.notes), "one data set numbers its classes in one way"
