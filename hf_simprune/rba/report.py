# SPDX-License-Identifier: Apache-2.0
"""What an analysis found, as plain data: JSON, and a table for the terminal. Imports no torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import InputError


_IMAGE_COUNTS = {
    "fit": "to fit",
    "selection": "to select",
    "cost": "of these for the costs below",
    "unreadable": "unreadable",
}
_SHOWN_SPANS = 10  # cheapest spans of each map in the table


@dataclass(frozen=True)
class SpanRecord:
    """One span: removes blocks start..end-1, maps `hidden_states[start]` to `hidden_states[end]`.

    `br_*` is the block redundancy of RBA, the negative mean squared difference of the two states (CLS or all tokens);
    `cka` and `svcca` compare all tokens; `explained_variance` is that of the best linear map on images it was not
    fitted on. NaN where a quantity was not computed.
    """

    start: int
    end: int
    br_cls: float = math.nan
    br_all: float = math.nan
    cosine_cls: float = math.nan
    cosine_all: float = math.nan
    cka: float = math.nan
    svcca: float = math.nan
    explained_variance: float = math.nan
    costs: dict[str, float] = field(default_factory=dict)  # kind of map -> measured cost; empty above max_span


@dataclass(frozen=True)
class HalfRecord:
    """One half of a block ("attention" or "mlp") and what replacing it costs, by kind of map."""

    block: int
    half: str
    costs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RedundancyReport:
    """Everything an analysis measured on one model and one set of images.

    Attributes:
        model: Name or folder of the model.
        family: As the adapter calls it, for example `vit`.
        depth: Blocks, L; `hidden_states[i]` has i = 0..L.
        width: Features of a token, D.
        cost_name: What `costs` are, with the unit.
        spans: All spans, by start and end.
        halves: All halves that were offered; empty with block granularity.
        images: How many images each part used, and which: data set, revision, seed, indices.
        settings: The options of the analysis.
        seconds: Duration of each part, wall clock.
        plain_forward_seconds: The model's own forward over as many images as the moment pass read.
    """

    model: str
    family: str
    depth: int
    width: int
    cost_name: str
    spans: tuple[SpanRecord, ...]
    halves: tuple[HalfRecord, ...] = ()
    images: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    plain_forward_seconds: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are not finite are None."""
        return _finite(asdict(self))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "RedundancyReport":
        """The report of `to_dict`.

        Raises:
            InputError: a field is missing, unknown or of another type.
        """
        values = _known(cls, content, "report")
        values["spans"] = tuple(_record(SpanRecord, entry, "span") for entry in values.get("spans", ()))
        values["halves"] = tuple(_record(HalfRecord, entry, "half") for entry in values.get("halves", ()))
        if values.get("plain_forward_seconds", 0.0) is None:
            values["plain_forward_seconds"] = math.nan
        return _made(cls, values, "report")

    def save(self, path: str | Path) -> None:
        """Write JSON, UTF-8."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "RedundancyReport":
        """Read what `save` wrote.

        Raises:
            InputError: no such file, no JSON, or not a report.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"report {path}: {error.strerror or error}") from None
        except ValueError as error:
            raise InputError(f"report {path}: not valid JSON: {error}") from None
        if not isinstance(content, dict):
            raise InputError(f"report {path}: expected an object, found a {type(content).__name__}")
        return cls.from_dict(content)

    def cheapest(self, map_kind: str, blocks: int = 1) -> SpanRecord | None:
        """The span of `blocks` blocks that `map_kind` replaces at the least measured cost, None without one."""
        measured = [
            span
            for span in self.spans
            if span.end - span.start == blocks and math.isfinite(span.costs.get(map_kind, math.nan))
        ]
        return min(measured, key=lambda span: span.costs[map_kind], default=None)

    def map_kinds(self) -> tuple[str, ...]:
        """Kinds of span map that were measured, in the order met."""
        return tuple(dict.fromkeys(kind for span in self.spans for kind in span.costs))

    def table(self) -> str:
        """The report for a terminal: single blocks, cheapest spans, halves, timings. Plain text, no colour."""
        return "\n\n".join(part for part in (self._heading(), *self._tables(), self._timings()) if part)

    def _heading(self) -> str:
        counts = [f"{self.images[key]} {words}" for key, words in _IMAGE_COUNTS.items() if self.images.get(key)]
        lines = [f"{self.model}: {self.family}, {self.depth} blocks of width {self.width}", f"cost: {self.cost_name}"]
        return "\n".join([*lines, *([f"images: {', '.join(counts)}"] if counts else [])])

    def _tables(self) -> list[str]:
        kinds = self.map_kinds()
        header = [
            "blocks",
            "BR (CLS)",
            "BR (all)",
            "cosine",
            "CKA",
            "SVCCA",
            "expl. var.",
            *(f"cost {k}" for k in kinds),
        ]

        def row(span: SpanRecord) -> list[str]:
            metrics = (span.br_cls, span.br_all, span.cosine_all, span.cka, span.svcca, span.explained_variance)
            return [
                block_range(span.start, span.end),
                *(number(value) for value in metrics),
                *(number(span.costs.get(kind, math.nan)) for kind in kinds),
            ]

        single = [span for span in self.spans if span.end == span.start + 1]
        longer = [span for span in self.spans if span.end > span.start + 1 and _least(span) < math.inf]
        tables = [text_table(header, [row(span) for span in single], "Single blocks")] if single else []
        if longer:
            shown = sorted(longer, key=_least)[:_SHOWN_SPANS]
            tables.append(text_table(header, [row(span) for span in shown], "Cheapest longer spans"))
        if self.halves:
            half_kinds = tuple(dict.fromkeys(kind for half in self.halves for kind in half.costs))
            rows = [
                [str(half.block), half.half, *(number(half.costs.get(kind, math.nan)) for kind in half_kinds)]
                for half in self.halves
            ]
            tables.append(text_table(["block", "half", *(f"cost {kind}" for kind in half_kinds)], rows, "Half blocks"))
        return tables

    def _timings(self) -> str:
        if not self.seconds:
            return ""
        total = sum(self.seconds.values())
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
        text = f"time: {parts}; {total:.1f} s in all"
        if math.isfinite(self.plain_forward_seconds) and self.plain_forward_seconds > 0:
            plain = self.plain_forward_seconds
            text += f", {total / plain:.1f} times a plain forward over the same images ({plain:.1f} s)"
        return text


def number(value: float, digits: int = 4) -> str:
    """`value` with at most `digits` significant digits; `-` where it is not finite."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def block_range(start: int, end: int) -> str:
    """Blocks start..end-1 as people write them: `3` or `3-5`."""
    return str(start) if end == start + 1 else f"{start}-{end - 1}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    """Columns of equal width, the first to the left and the others to the right."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join((first, *others)).rstrip()

    lines = [line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)]
    return "\n".join(([title] if title else []) + lines)


def _least(span: SpanRecord) -> float:
    return min((cost for cost in span.costs.values() if math.isfinite(cost)), default=math.inf)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _known(kind: type, content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected an object, got {content!r}")
    names = {entry.name for entry in fields(kind)}
    unknown = sorted(set(content) - names)
    if unknown:
        raise InputError(f"{where}: unknown field {unknown[0]}; known are {', '.join(sorted(names))}")
    return dict(content)


def _record(kind: type, content: Any, where: str) -> Any:
    values: dict[str, Any] = {
        name: math.nan if value is None else value for name, value in _known(kind, content, where).items()
    }
    if "costs" in values:
        values["costs"] = {name: math.nan if value is None else value for name, value in dict(values["costs"]).items()}
    return _made(kind, values, where)


def _made(kind: type, values: dict[str, Any], where: str) -> Any:
    try:
        return kind(**values)
    except TypeError as error:
        raise InputError(f"{where}: {str(error).removeprefix(kind.__name__ + '.__init__() ')}") from None
