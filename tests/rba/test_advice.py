"""What a user is told: nothing where all is well, and a plain sentence with the numbers where it is not."""

import math
from dataclasses import replace

import pytest

from hf_simprune.rba.advice import LITTLE_TO_GIVE, network_notes, result_notes
from hf_simprune.rba.comparison import Accuracy, Comparison
from hf_simprune.rba.report import RedundancyReport, SpanRecord


COMPARISON = Comparison(
    images=100, device="CPU", parameters=(10, 8), macs=(10, 8), seconds=(0.1, 0.08), file_bytes=(40, 32),
    latency_ratio=(0.8, 0.78, 0.82), cost_name="KL of the logits, nats", cost=(0.2, 0.1, 0.3), relative_error=0.1,
    agreement=0.95,
)  # fmt: skip


def report(*spans: SpanRecord) -> RedundancyReport:
    return RedundancyReport("vit", "vit", depth=4, width=8, cost_name="KL of the logits, nats", spans=spans)


def accuracy(before: float, after: float) -> Accuracy:
    return Accuracy(before, after, (after - before, after - before, after - before), 100)


def test_a_network_is_called_poor_by_its_cheapest_single_block_of_any_map():
    dear, cheap = LITTLE_TO_GIVE + 0.1, LITTLE_TO_GIVE - 0.1
    spans = [SpanRecord(1, 2, costs={"fold": dear, "linear": dear + 1}), SpanRecord(2, 3, costs={"fold": dear + 2})]
    [note] = network_notes(report(*spans))
    assert "little to give" in note and "(1, by fold)" in note and f"{dear:.2g} nats" in note
    assert network_notes(report(*spans, SpanRecord(3, 4, costs={"linear": cheap}))) == []
    # a longer span says nothing about single blocks
    assert len(network_notes(report(*spans, SpanRecord(2, 4, costs={"fold": cheap})))) == 1


def test_nothing_is_said_about_what_was_not_measured():
    assert network_notes(report()) == []
    assert network_notes(report(SpanRecord(1, 2), SpanRecord(2, 3, costs={"fold": math.inf}))) == []


def test_a_result_that_loses_little_needs_no_words():
    assert result_notes(replace(COMPARISON, head=accuracy(0.8, 0.76))) == []
    assert result_notes(COMPARISON) == []


def test_lost_accuracy_is_told_in_points():
    [note] = result_notes(replace(COMPARISON, head=accuracy(0.8, 0.7)))
    assert "costs 10.0 points of top-1" in note


@pytest.mark.parametrize("head", [None, Accuracy(None, None, None, 100, "no labels of its own")])
def test_a_re_trained_head_speaks_where_the_original_cannot(head):
    [note] = result_notes(replace(COMPARISON, head=head, retrained=accuracy(0.9, 0.6), agreement=0.1))
    assert "30.0 points" in note


def test_without_labels_the_changed_classes_are_told():
    [note] = result_notes(replace(COMPARISON, agreement=0.7))
    assert note.startswith("30 % of the evaluation images get another class")
    # without a head there are no classes
    assert result_notes(replace(COMPARISON, agreement=None)) == []


def test_the_result_after_distillation_is_what_counts():
    before = replace(COMPARISON, head=accuracy(0.8, 0.5))
    after = replace(COMPARISON, head=accuracy(0.8, 0.79), cost=(0.05, 0.04, 0.06))
    assert result_notes(before, after) == []
    [note] = result_notes(after, replace(after, cost=(0.05, 0.04, 0.06)))
    assert "Distillation did not help: the cost went from 0.05 to 0.05" in note


def test_a_missed_latency_is_told():
    assert result_notes(COMPARISON, latency_limit=0.8) == []
    [note] = result_notes(COMPARISON, latency_limit=0.75)
    assert "0.800 times the original's was measured, 0.750 times allowed" in note
