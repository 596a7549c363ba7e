"""What a card says of licence, benchmark and data, and which options for it are refused."""

import re
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from hf_simprune.errors import InputError
from hf_simprune.hub.card_options import check_benchmark, check_card_options
from hf_simprune.hub.eval_results import Evaluated, benchmark_entry, evaluated_images, write_benchmark_entries
from hf_simprune.hub.facts import Licence, hardware, licence_of


def options(**changes):
    """As a run has them, images and network being on this disk."""
    values = dict.fromkeys(
        ("license", "base_model_id", "dataset_id", "eval_dataset_id", "eval_dataset_name_or_path", "eval_split",
         "dataset_config_name", "dataset_revision")
    )  # fmt: skip
    values |= {"eval_task_id": "default", "model_name_or_path": "/", "dataset_name_or_path": "/"}
    return SimpleNamespace(**values | changes)


class TestOptions:
    def test_copies_a_licence_and_a_benchmark_are_accepted(self):
        check_card_options(options())
        ids = {"base_model_id": "a/vit", "dataset_id": "a/set", "eval_dataset_id": "a/set", "eval_split": "test"}
        check_card_options(options(license="cc-by-nc-4.0", **ids))
        check_card_options(options(dataset_name_or_path="a/set", dataset_id="a/set", model_name_or_path="a/vit"))

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"license": "Apache 2.0"}, "--license Apache 2.0 is no licence .*did you mean apache-2.0"),
            ({"license": "mine"}, "--license mine is no licence .*: "),
            ({"license": "other"}, "--license other: it needs a name"),
            ({"base_model_id": "a/b/c"}, "--base_model_id a/b/c cannot be a repository"),
            ({"base_model_id": "a/vit", "model_name_or_path": None}, "there is no --model_name_or_path"),
            ({"base_model_id": "a/vit", "model_name_or_path": "b/vit"}, "--model_name_or_path is b/vit, which is on"),
            (
                {"dataset_id": "a/set", "dataset_name_or_path": "b/set"},
                "--dataset_id a/set: --dataset_name_or_path is",
            ),
            ({"eval_dataset_id": "a b"}, "--eval_dataset_id a b cannot be a repository"),
            ({"eval_dataset_id": "a/set"}, "a benchmark's score is that of one of its splits"),
            ({"eval_task_id": "knn"}, "--eval_task_id knn is a task of a benchmark"),
            ({"eval_dataset_id": "a/set", "eval_task_id": " ", "eval_split": "test"}, "--eval_task_id is empty"),
            ({"eval_dataset_id": "a/set", "eval_split": "test", "dataset_name_or_path": "b/set"}, "those of b/set"),
        ],
    )
    def test_mistakes_are_one_line_that_names_the_option(self, changes, message):
        with pytest.raises(InputError, match=message) as error:
            check_card_options(options(**changes))
        assert "\n" not in str(error.value)

    def test_images_of_the_benchmark_itself_are_accepted(self):
        check_benchmark("a/set", "knn", "a/set", "test")


class TestLicence:
    def card(self, folder, text):
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text(f"---\n{text}\n---\n# A title\n")
        return str(folder)

    def test_is_that_of_the_starting_models_card(self, tmp_path):
        assert licence_of(self.card(tmp_path / "a", "license: mit")) == Licence("mit")
        assert licence_of(self.card(tmp_path / "a", "license: [mit]")) == Licence("mit")
        other = "license: other\nlicense_name: theirs\nlicense_link: https://example.org"
        assert licence_of(self.card(tmp_path / "a", other)) == Licence("other", "theirs", "https://example.org")

    def test_one_that_the_list_lacks_keeps_its_name(self, tmp_path):
        assert licence_of(self.card(tmp_path / "a", "license: made-up")) == Licence("other", "made-up")

    @pytest.mark.parametrize("text", ["tags: [vit]", "license: [mit, isc]", "license: other", "a: [", "- a"])
    def test_is_unknown_where_the_card_does_not_say(self, tmp_path, text):
        assert licence_of(self.card(tmp_path / "a", text)) is None

    def test_is_unknown_without_a_card_or_a_hub(self, tmp_path):
        assert licence_of(str(tmp_path)) is None
        assert licence_of("nobody/nothing") is None  # the tests run offline


class TestEvaluated:
    def test_held_out_images_are_of_the_split_they_were_drawn_from(self, tmp_path):
        args = options(dataset_name_or_path=str(tmp_path), dataset_config_name="small", dataset_revision="v2")
        found = evaluated_images(args, "train[:90%]")
        assert found.split == "train[:90%]" and found.dataset == tmp_path.name
        assert (found.dataset_id, found.config, found.revision) == (None, "small", "v2")

    def test_another_data_set_has_its_own_name_and_no_configuration_of_the_first(self):
        args = options(dataset_config_name="small", eval_dataset_name_or_path="b/other")
        found = evaluated_images(args, "fit")
        assert (found.dataset, found.dataset_id, found.split, found.config) == ("other", "b/other", "train", None)
        assert evaluated_images(options(eval_split="test"), "train", benchmark="a/set").dataset_id == "a/set"

    def test_results_on_different_numbers_of_images_keep_their_numbers(self):
        images = Evaluated(dataset="my flowers", split="test")
        results = [
            images.accuracy("head", 0.7, 139, "as it was"),
            images.accuracy("probe", 0.81234, 1500, "as it was"),
        ]
        name, again = model_index_to_eval_results(eval_results_to_model_index("net", results))
        assert name == "net" and again == results
        assert again[1].metric_args == {"num_samples": 1500} and again[1].metric_value == 0.8123
        assert again[1].metric_name == "probe, 1,500 images" and again[1].dataset_type == "my-flowers"


class TestBenchmark:
    def test_the_file_is_as_the_hub_specifies_it(self, tmp_path):
        revision = "0123456789abcdef0123456789abcdef01234567"
        images = Evaluated(dataset="x", split="validation", dataset_id="ILSVRC/imagenet-1k", revision=revision)
        result = images.accuracy("top-1, original head", 0.705, 5000, "image classification")
        (path,) = write_benchmark_entries(tmp_path, [benchmark_entry(result, "ILSVRC/imagenet-1k", "top1")])
        assert path == tmp_path / ".eval_results" / "ILSVRC--imagenet-1k--top1.yaml"
        (entry,) = yaml.safe_load(path.read_text())
        assert entry.keys() == {"dataset", "value", "date", "notes"}
        assert entry["dataset"] == {"id": "ILSVRC/imagenet-1k", "task_id": "top1", "revision": revision}
        assert entry["value"] == 0.705 and re.fullmatch(r"\d{4}-\d\d-\d\d", entry["date"])
        assert "5,000 images of validation" in entry["notes"] and "fraction" in entry["notes"]

    def test_a_branch_is_no_revision_and_a_second_score_replaces_the_first(self, tmp_path):
        images = Evaluated(dataset="x", split="test", revision="main")
        for value in (0.1, 0.2):
            entry = benchmark_entry(images.accuracy("k-NN", value, 10, "k-NN"), "a/set")
            (path,) = write_benchmark_entries(tmp_path, [entry])
        (entry,) = yaml.safe_load(path.read_text())
        assert entry["value"] == 0.2 and "revision" not in entry["dataset"]
        assert len(list((tmp_path / ".eval_results").iterdir())) == 1

    def test_nothing_is_written_without_a_score(self, tmp_path):
        assert write_benchmark_entries(tmp_path, []) == [] and not list(tmp_path.iterdir())


def test_the_hardware_is_named():
    assert re.match(r"\d+ (×|CPU cores|cores of an?) ", hardware())
