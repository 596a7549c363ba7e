"""A report keeps its numbers in JSON and shows them in a table."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest

from hf_simprune.errors import InputError
from hf_simprune.rba.report import HalfRecord, RedundancyReport, SpanRecord, block_range, number, text_table

from ..tiny_run import ROOT


REPORT = RedundancyReport(
    model="somewhere/vit",
    family="vit",
    depth=3,
    width=8,
    cost_name="KL of the logits, nats",
    spans=(
        SpanRecord(0, 1, br_cls=-4.0, br_all=-5.0, cosine_all=0.25),
        SpanRecord(0, 2, br_cls=-6.0),
        SpanRecord(1, 2, br_cls=-1.0, br_all=-1.5, cka=0.75, costs={"fold": 0.125, "linear": 0.5}),
        SpanRecord(1, 3, br_cls=-2.0, costs={"fold": 0.75, "linear": 0.625}),
        SpanRecord(2, 3, br_cls=-3.0, costs={"fold": 0.25, "linear": 0.0625}),
    ),
    halves=(HalfRecord(1, "attention", {"linear": 0.03125, "const": 0.375}),),
    images={"fit": 20, "selection": 10, "cost": 4, "seed": 7, "unreadable": 0, "indices": {"fit": [1, 2]}},
    seconds={"moments": 3.0, "costs": 1.0},
    plain_forward_seconds=2.0,
)


def line_of(table: str, *start: str) -> list[str]:
    """The cells of the only line that starts with these words."""
    [found] = [line.split() for line in table.splitlines() if line.split()[: len(start)] == list(start)]
    return found


def test_json_holds_everything(tmp_path):
    REPORT.save(tmp_path / "redundancy.json")
    loaded = RedundancyReport.load(tmp_path / "redundancy.json")
    assert loaded.to_dict() == REPORT.to_dict()
    assert math.isnan(loaded.spans[1].br_all)
    # spans without a NaN are equal as they are
    assert loaded.halves == REPORT.halves and loaded.seconds == REPORT.seconds
    assert loaded.spans[2].costs == {"fold": 0.125, "linear": 0.5}


def test_json_has_no_numbers_that_other_readers_refuse(tmp_path):
    bad = replace(REPORT.spans[2], costs={"fold": math.inf})
    replace(REPORT, spans=(bad,), plain_forward_seconds=math.nan).save(tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["plain_forward_seconds"] is None
    loaded = RedundancyReport.load(tmp_path / "r.json")
    assert math.isnan(loaded.plain_forward_seconds) and math.isnan(loaded.spans[0].costs["fold"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content | {"extra": 1}, "unknown field extra"),
        (lambda content: content | {"spans": [{"start": 0}]}, "missing"),
        (lambda content: content | {"spans": [{"start": 0, "end": 1, "cost": 2}]}, "unknown field cost"),
        (lambda content: content | {"halves": [3]}, "half: expected an object, got 3"),
        (lambda content: [content], "expected an object"),
        (lambda content: {key: value for key, value in content.items() if key != "depth"}, "depth"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(tmp_path, change, message):
    (tmp_path / "r.json").write_text(json.dumps(change(REPORT.to_dict())))
    with pytest.raises(InputError, match=message) as caught:
        RedundancyReport.load(tmp_path / "r.json")
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere.json: No such file"):
        RedundancyReport.load(tmp_path / "nowhere.json")
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        RedundancyReport.load(tmp_path / "r.json")


def test_cheapest_span_by_map_and_length():
    assert REPORT.cheapest("fold") == REPORT.spans[2]
    assert REPORT.cheapest("linear") == REPORT.spans[4]
    assert REPORT.cheapest("linear", blocks=2) == REPORT.spans[3]
    assert REPORT.cheapest("identity") is None and REPORT.cheapest("fold", blocks=3) is None
    assert REPORT.map_kinds() == ("fold", "linear")


def test_table_shows_the_numbers_and_dashes_for_the_rest():
    table = REPORT.table()
    assert line_of(table, "0") == ["0", "-4", "-5", "0.25", *["-"] * 5]
    assert line_of(table, "1", "-1") == ["1", "-1", "-1.5", "-", "0.75", "-", "-", "0.125", "0.5"]
    assert line_of(table, "1-2")[-2:] == ["0.75", "0.625"]
    assert line_of(table, "1", "attention") == ["1", "attention", "0.03125", "0.375"]
    assert "0-1" not in table  # longer than what was measured
    assert "images: 20 to fit, 10 to select, 4 of these for the costs below" in table.splitlines()
    assert "moments 3.0 s, costs 1.0 s; 4.0 s in all, 2.0 times a plain forward" in table
    assert "\x1b" not in table and max(map(len, table.splitlines())) <= 120


def test_table_lists_the_cheapest_longer_spans_first():
    spans = [SpanRecord(1, 1 + length, costs={"fold": 1 / length}) for length in range(2, 30)]
    table = replace(REPORT, depth=40, spans=tuple(spans), halves=()).table()
    rows = [line.split()[0] for line in table.splitlines() if line.startswith("1-")]
    assert rows == [f"1-{length}" for length in range(29, 19, -1)]


def test_columns_line_up():
    lines = text_table(["a", "b"], [["long name", "1"], ["x", "12345"]], "Title").splitlines()
    assert lines == ["Title", "a              b", "---------  -----", "long name      1", "x          12345"]


def test_numbers_and_ranges_as_people_write_them():
    assert [number(value) for value in (0.123456, 12345.6, -0.00001234, math.nan)] == [
        "0.1235", "12346", "-1.234e-05", "-",
    ]  # fmt: skip
    assert (block_range(3, 4), block_range(3, 6)) == ("3", "3-5")


def test_importing_it_imports_no_torch():
    code = "import sys, hf_simprune.rba.report, hf_simprune.rba.arguments; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "False", found.stderr
