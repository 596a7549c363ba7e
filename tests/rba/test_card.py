"""What a card says of a compression's results, from made-up numbers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from hf_simprune.hub.facts import Licence, licence_of
from hf_simprune.rba.arguments import CompressArguments
from hf_simprune.rba.card import benchmark_notes, eval_results, final_comparison, limits, origin, protocol
from hf_simprune.rba.comparison import Accuracy, Comparison


FOUND = Comparison(
    images=166,
    device="CPU",
    parameters=(10, 8),
    macs=(10, 8),
    seconds=(0.2, 0.1),
    file_bytes=(10, 8),
    latency_ratio=(0.5, 0.4, 0.6),
    cost_name="KL of the logits, nats",
    cost=(0.2, 0.1, 0.3),
    relative_error=0.1,
    agreement=0.9,
    head=Accuracy(0.74, 0.705, (-0.035, -0.09, 0.018), 139),
    retrained=Accuracy(0.8, 0.79, (-0.01, -0.02, 0.0), 150),
)
IMAGES = SimpleNamespace(calibration=SimpleNamespace(fit=range(222), select=range(111)))


@pytest.fixture
def args(tmp_path):
    return CompressArguments(dataset_name_or_path=str(tmp_path), output_dir="out", model_name_or_path="some/vit")


def test_the_results_are_those_of_the_compressed_network_each_with_its_images(args):
    head, retrained = eval_results(args, FOUND)
    assert (head.metric_value, head.metric_args) == (0.705, {"num_samples": 139})
    assert (retrained.metric_value, retrained.metric_args) == (0.79, {"num_samples": 150})
    unknown = replace(FOUND, head=Accuracy(None, None, None, 0, "no names"), retrained=None)
    assert eval_results(args, unknown) == []


def test_the_network_in_the_folder_is_the_distilled_one_where_there_is_one():
    healed = replace(FOUND, images=165)
    assert final_comparison(SimpleNamespace(comparison=FOUND, healed=healed)) is healed
    assert final_comparison(SimpleNamespace(comparison=FOUND, healed=None)) is FOUND


def test_a_benchmark_without_a_score_is_told_why(args):
    args = replace(args, eval_dataset_id="a/set")
    assert benchmark_notes(args, FOUND) == []
    unknown = replace(FOUND, head=Accuracy(None, None, None, 0, "no names"), retrained=None)
    assert benchmark_notes(args, unknown) == [
        "There is no score for a/set: No accuracy of the original head: no names."
    ]
    assert benchmark_notes(replace(args, eval_dataset_id=None), unknown) == []


def test_every_row_of_the_table_says_what_it_was_measured_on():
    rows = {row[0]: row[4] for row in FOUND.card_rows()}
    assert rows["top-1, original head"] == "139 images" and rows["top-1, re-trained linear head"] == "150 images"
    assert rows["KL of the logits, nats"] == rows["same class as the original"] == "166 images"
    assert rows["latency of one image, ms (CPU)"] == "30 rounds" and rows["parameters, M"] == ""
    assert [row[:4] for row in FOUND.card_rows()] == FOUND.rows()


@pytest.mark.parametrize(
    ("metadata", "base"), [("base_model: a/vit", "a/vit"), ("base_model: [a/vit]", "a/vit"), ("base_model: /x", None)]
)
def test_a_network_compressed_before_keeps_its_origin_and_has_no_licence_yet(args, tmp_path, metadata, base):
    folder = tmp_path / "smaller"
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{metadata}\nlicense: unknown\n---\n# A title\n")
    assert origin(replace(args, model_name_or_path=str(folder))) == ("smaller", base)
    assert origin(replace(args, model_name_or_path=str(folder), base_model_id="b/copy")) == ("b/copy", "b/copy")
    assert origin(args) == ("some/vit", "some/vit") and licence_of(str(folder)) is None


def test_limits_and_protocol_follow_from_the_run():
    result = SimpleNamespace(comparison=FOUND, healed=None)
    told = " ".join(limits(IMAGES, result, Licence("mit")))
    assert "166 images" in told and "licence" not in told and "uncertain" not in told
    few = SimpleNamespace(calibration=SimpleNamespace(fit=range(20), select=range(9)))
    told = " ".join(limits(few, result, None))
    assert "No licence was named" in told and "9 images only" in told
    assert "222 images to fit the maps, 111 to choose" in protocol(FOUND, IMAGES)[0]
    assert len(protocol(replace(FOUND, retrained=None), IMAGES)) == len(protocol(FOUND, IMAGES)) - 1
