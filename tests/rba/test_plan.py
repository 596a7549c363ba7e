# SPDX-License-Identifier: Apache-2.0
"""The record of what is replaced: its rules, and its JSON."""

import itertools
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

from hf_simprune.errors import InputError
from hf_simprune.rba.plan import HALF_MAPS, HALVES, CompressionPlan, Half, Span, check_depth


PLAN = CompressionPlan(
    12,
    (Span(9, 11, "low_rank", 16), Span(4, 5)),
    (Half(7, "mlp", "const"), Half(3, "attention", "linear")),
)


def test_a_plan_is_sorted_frozen_and_hashable():
    assert PLAN.spans == (Span(4, 5), Span(9, 11, "low_rank", 16))
    assert PLAN.halves == (Half(3, "attention", "linear"), Half(7, "mlp", "const"))
    assert PLAN == CompressionPlan(12, list(reversed(PLAN.spans)), list(reversed(PLAN.halves)))
    assert len({PLAN, CompressionPlan(12, PLAN.spans, PLAN.halves)}) == 1
    with pytest.raises(FrozenInstanceError):
        PLAN.depth = 3


def test_removed_blocks_and_text():
    assert PLAN.removed_blocks == (4, 9, 10)
    assert str(PLAN) == (
        "12 → 9 blocks: fold 4→5, low_rank of rank 16 9→11, attention of block 3 by linear, mlp of block 7 by const"
    )
    assert str(CompressionPlan(3)) == "nothing replaced in 3 blocks"


@pytest.mark.parametrize(
    ("spans", "halves", "own"),
    [
        ((), (), False),
        ((Span(1, 2), Span(3, 4, "identity")), (), False),
        ((Span(1, 2, "linear"),), (), True),
        ((Span(1, 2), Span(3, 4, "res_mlp")), (), True),
        ((Span(1, 2),), (Half(0, "attention", "const"),), True),
    ],
)
def test_only_folds_and_identities_fit_stock_classes(spans, halves, own):
    assert CompressionPlan(6, spans, halves).needs_own_classes is own


def test_json_round_trip(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert CompressionPlan.load(tmp_path / "plan.json") == PLAN
    assert CompressionPlan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN


def test_a_hand_written_plan_may_leave_out_what_is_usual():
    assert CompressionPlan.from_dict({"depth": 6, "spans": [{"start": 2, "end": 4}]}) == CompressionPlan(
        6, (Span(2, 4, "fold"),)
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Span(2, 2), "span 2→2 is empty"),
        (lambda: Span(3, 2), "end must be larger"),
        (lambda: Span(-1, 2), "span start=-1"),
        (lambda: Span(True, 2), "span start=True"),
        (lambda: Span(1, 2.0), "span end=2.0"),
        (lambda: Span(0, 2), "no block before it to fold into"),
        (lambda: Span(1, 2, "quadratic"), "span map='quadratic': one of fold, linear"),
        (lambda: Span(1, 2, ["fold"]), "span map="),
        (lambda: Span(1, 2, "low_rank"), "rank=None: low_rank needs"),
        (lambda: Span(1, 2, "low_rank", 0), "rank=0"),
        (lambda: Span(1, 2, "low_rank", 2.5), "rank=2.5"),
        (lambda: Span(1, 2, "linear", 4), "only low_rank takes a rank, not linear"),
        (lambda: Half(-1, "mlp", "const"), "half block=-1"),
        (lambda: Half(1, "norm", "const"), "half='norm': one of attention, mlp"),
        (lambda: Half(1, "mlp", "fold"), "half map='fold': one of linear, const"),
        (lambda: CompressionPlan(0), "depth=0"),
        (lambda: CompressionPlan("12"), "depth='12'"),
        (lambda: CompressionPlan(4, (Span(2, 5),)), "fold 2→5 is too long for 4 blocks"),
        (lambda: CompressionPlan(4, (Span(0, 4, "linear"),)), "leaves none of the 4 blocks"),
        (lambda: CompressionPlan(9, (Span(1, 4), Span(3, 5))), "fold 1→4 and fold 3→5 overlap"),
        (lambda: CompressionPlan(9, (Span(1, 3), Span(1, 3))), "overlap"),
        (lambda: CompressionPlan(9, (Span(5, 6, "linear"), Span(3, 5))), "adjacent: keep a block between them"),
        (lambda: CompressionPlan(4, (), (Half(4, "mlp", "const"),)), "does not fit a model of 4 blocks, 0 to 3"),
        (lambda: CompressionPlan(4, (Span(1, 3),), (Half(2, "attention", "const"),)), "removed by a span"),
        (
            lambda: CompressionPlan(4, (), (Half(2, "mlp", "const"), Half(2, "mlp", "linear"))),
            "the mlp of block 2 is replaced twice",
        ),
        (lambda: CompressionPlan(4, (Span(2, 3),), (Half(1, "mlp", "linear"),)), "fold 2→3 folds into that MLP"),
        (lambda: CompressionPlan(4, ((1, 2),)), r"spans holds \(1, 2\)"),
        (lambda: CompressionPlan(4, (), (Span(1, 2),)), "halves holds Span"),
        (lambda: CompressionPlan(4, Span(1, 2)), "a list of Span is needed"),
    ],
)
def test_a_bad_plan_is_refused_in_one_line(build, message):
    with pytest.raises(InputError, match=message) as error:
        build()
    assert str(error.value).startswith("plan: ") and "\n" not in str(error.value)


def test_what_looks_like_a_conflict_but_is_none():
    CompressionPlan(4, (Span(2, 3),), (Half(1, "attention", "linear"), Half(3, "mlp", "const")))
    CompressionPlan(4, (Span(2, 3, "linear"),), (Half(1, "mlp", "linear"),))
    CompressionPlan(3, (Span(1, 3),))
    CompressionPlan(3, (Span(0, 1, "linear"), Span(2, 3)))
    CompressionPlan(2, (), tuple(Half(block, half, "const") for block in range(2) for half in HALVES))


def test_valid_is_just_what_the_rules_say():
    items = [Span(0, 1, "linear"), Span(1, 2), Span(2, 3, "identity"), Span(1, 3)]
    items += [Half(block, half, m) for block in (0, 1) for half in HALVES for m in HALF_MAPS]
    accepted = 0
    for count in range(4):
        for chosen in itertools.combinations(items, count):
            spans = [item for item in chosen if isinstance(item, Span)]
            halves = [item for item in chosen if isinstance(item, Half)]
            valid = all(a.end < b.start or b.end < a.start for a, b in itertools.combinations(spans, 2))
            valid &= len({(half.block, half.half) for half in halves}) == len(halves)
            for span, half in itertools.product(spans, halves):
                valid &= not span.start <= half.block < span.end
                valid &= not (span.map == "fold" and half.half == "mlp" and half.block == span.start - 1)
            try:
                CompressionPlan(3, tuple(spans), tuple(halves))
            except InputError:
                assert not valid, chosen
            else:
                assert valid, chosen
                accepted += 1
    assert accepted > 50


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "plan is .*an object with the keys depth, spans, halves"),
        ({}, "plan lacks the key 'depth'"),
        ({"depth": 4, "layers": []}, "plan has the unknown key 'layers'"),
        ({"depth": 4, "spans": {"start": 1}}, "plan: spans=.*a list is needed"),
        ({"depth": 4, "spans": [3]}, r"plan: spans\[0\] is 3"),
        ({"depth": 4, "spans": [{"start": 1, "end": 2}, {"start": 3}]}, r"plan: spans\[1\] lacks the key 'end'"),
        ({"depth": 4, "spans": [{"start": 1, "end": 2, "kind": "fold"}]}, r"spans\[0\] has the unknown key 'kind'"),
        ({"depth": 4, "spans": [{"start": "1", "end": 2}]}, "span start='1'"),
        ({"depth": 4, "spans": [{"start": 1, "end": 2, "map": None}]}, "span map=None"),
        ({"depth": 4, "halves": [{"block": 1, "half": "mlp"}]}, r"halves\[0\] lacks the key 'map'"),
        ({"depth": 4, "halves": None}, "halves=None: a list is needed"),
        ({"depth": None}, "depth=None"),
    ],
)
def test_bad_json_names_the_field(values, message, tmp_path):
    with pytest.raises(InputError, match=message):
        CompressionPlan.from_dict(values)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message) as error:
        CompressionPlan.load(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_no_plan_is_named(tmp_path):
    with pytest.raises(InputError, match="absent.json' cannot be read"):
        CompressionPlan.load(tmp_path / "absent.json")
    (tmp_path / "text.json").write_text("depth: 4")
    with pytest.raises(InputError, match="text.json' is not JSON"):
        CompressionPlan.load(tmp_path / "text.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="bytes.json' is not JSON"):
        CompressionPlan.load(tmp_path / "bytes.json")


def test_a_plan_for_another_depth_is_refused():
    check_depth(PLAN, 12)
    with pytest.raises(InputError, match="depth=12, but the model has 24 blocks"):
        check_depth(PLAN, 24)


def test_plan_and_planner_import_no_torch():
    code = (
        "import sys, hf_simprune.rba, hf_simprune.rba.planner\n"
        "from hf_simprune.rba import CompressionPlan, Half, Span\n"
        "assert set(hf_simprune.rba.__all__) <= set(dir(hf_simprune.rba))\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
