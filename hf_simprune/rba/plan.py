# SPDX-License-Identifier: Apache-2.0
"""What a compressed model replaces: a small frozen record that is written by hand or by the planner, in JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError


SPAN_MAPS = ("fold", "linear", "identity", "low_rank", "mlp", "res_mlp")
HALF_MAPS = ("linear", "const")
HALVES = ("attention", "mlp")
STOCK_MAPS = ("fold", "identity")
MAX_DEPTH = 10_000


@dataclass(frozen=True, order=True)
class Span:
    """Blocks `start` to `end - 1` go; `map` takes `hidden_states[start]` to `hidden_states[end]` in their place.

    A `fold` is merged into the MLP of block `start - 1`. `rank` is for `low_rank` only, which needs it.

    Raises:
        InputError: a field has the wrong type or value.
    """

    start: int
    end: int
    map: str = "fold"
    rank: int | None = None

    def __post_init__(self) -> None:
        _check_index("plan: span start", self.start)
        _check_index("plan: span end", self.end)
        _check_choice("plan: span map", self.map, SPAN_MAPS)
        if self.start >= self.end:
            raise InputError(f"plan: span {self.start}→{self.end} is empty: its end must be larger than its start")
        if self.map == "fold" and self.start == 0:
            raise InputError(f"plan: fold 0→{self.end} has no block before it to fold into: start at 1 or more")
        if self.map == "low_rank":
            if not _is_integer(self.rank) or (self.rank or 0) < 1:
                raise InputError(f"plan: span rank={self.rank!r}: low_rank needs a whole number of 1 or more")
        elif self.rank is not None:
            raise InputError(f"plan: span rank={self.rank!r}: only low_rank takes a rank, not {self.map}")

    def __str__(self) -> str:
        rank = "" if self.rank is None else f" of rank {self.rank}"
        return f"{self.map}{rank} {self.start}→{self.end}"

    @property
    def length(self) -> int:
        """Number of blocks that go."""
        return self.end - self.start

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; `rank` only where there is one."""
        values = {"start": self.start, "end": self.end, "map": self.map}
        return values if self.rank is None else {**values, "rank": self.rank}


@dataclass(frozen=True, order=True)
class Half:
    """What one half of a block ("attention" or "mlp") adds to the residual stream is replaced; the residual stays.

    `linear` is an affine map of the half's layernormed input, `const` one vector.

    Raises:
        InputError: a field has the wrong type or value.
    """

    block: int
    half: str
    map: str

    def __post_init__(self) -> None:
        _check_index("plan: half block", self.block)
        _check_choice("plan: half", self.half, HALVES)
        _check_choice("plan: half map", self.map, HALF_MAPS)

    def __str__(self) -> str:
        return f"{self.half} of block {self.block} by {self.map}"

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {"block": self.block, "half": self.half, "map": self.map}


@dataclass(frozen=True)
class CompressionPlan:
    """The spans and halves to replace in a model of `depth` blocks, sorted. Indices are those of that model.

    Two spans have at least one block between them, a replaced half lies in no span, the block that a fold goes into
    keeps its MLP, and at least one block stays.

    Raises:
        InputError: one of these does not hold.
    """

    depth: int
    spans: tuple[Span, ...] = ()
    halves: tuple[Half, ...] = ()

    def __post_init__(self) -> None:
        if not _is_integer(self.depth) or not 1 <= self.depth <= MAX_DEPTH:
            raise InputError(f"plan: depth={self.depth!r}: a whole number from 1 to {MAX_DEPTH:,} is needed")
        object.__setattr__(self, "spans", _sorted_items("spans", self.spans, Span))
        object.__setattr__(self, "halves", _sorted_items("halves", self.halves, Half))
        self._check_spans()
        self._check_halves()

    def _check_spans(self) -> None:
        for span in self.spans:
            if span.end > self.depth:
                raise InputError(
                    f"plan: {span} is too long for {self.depth} blocks: its end must be {self.depth} or less"
                )
            if span.length == self.depth:
                raise InputError(f"plan: {span} leaves none of the {self.depth} blocks: at least one must stay")
        for left, right in zip(self.spans, self.spans[1:]):
            if right.start < left.end:
                raise InputError(f"plan: {left} and {right} overlap: a block can be removed once only")
            if right.start == left.end:
                raise InputError(
                    f"plan: {left} and {right} are adjacent: keep a block between them, or write one span "
                    f"{left.start}→{right.end}"
                )

    def _check_halves(self) -> None:
        removed = set(self.removed_blocks)
        folds = {span.start - 1: span for span in self.spans if span.map == "fold"}
        seen: set[tuple[int, str]] = set()
        for half in self.halves:
            if half.block >= self.depth:
                raise InputError(f"plan: {half} does not fit a model of {self.depth} blocks, 0 to {self.depth - 1}")
            if half.block in removed:
                raise InputError(f"plan: {half}: that block is removed by a span; keep one of the two")
            if (half.block, half.half) in seen:
                raise InputError(f"plan: the {half.half} of block {half.block} is replaced twice: keep one of the two")
            if half.half == "mlp" and half.block in folds:
                raise InputError(f"plan: {half}: {folds[half.block]} folds into that MLP, which must stay")
            seen.add((half.block, half.half))

    def __str__(self) -> str:
        if not self.items:
            return f"nothing replaced in {self.depth} blocks"
        return f"{self.depth} → {self.depth - len(self.removed_blocks)} blocks: " + ", ".join(map(str, self.items))

    @property
    def items(self) -> tuple[Span | Half, ...]:
        """Spans, then halves."""
        return (*self.spans, *self.halves)

    @property
    def removed_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that go, ascending."""
        return tuple(block for span in self.spans for block in range(span.start, span.end))

    @property
    def needs_own_classes(self) -> bool:
        """Whether the result has parts that no stock transformers class can hold."""
        return bool(self.halves) or any(span.map not in STOCK_MAPS for span in self.spans)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold and `from_dict` reads."""
        return {
            "depth": self.depth,
            "spans": [span.to_dict() for span in self.spans],
            "halves": [half.to_dict() for half in self.halves],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CompressionPlan":
        """The plan that `to_dict` or a person wrote; `spans` and `halves` may be left out, and a span's `map` (fold).

        Raises:
            InputError: a key is unknown or missing, a value has the wrong type, or the plan is not valid.
        """
        _check_keys("plan", values, required=("depth",), optional=("spans", "halves"))
        spans, halves = [], []
        for where, entry in _entries("spans", values):
            _check_keys(where, entry, required=("start", "end"), optional=("map", "rank"))
            spans.append(Span(**entry))
        for where, entry in _entries("halves", values):
            _check_keys(where, entry, required=("block", "half", "map"))
            halves.append(Half(**entry))
        return cls(values["depth"], tuple(spans), tuple(halves))

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "CompressionPlan":
        """Reads a plan in JSON.

        Raises:
            InputError: the file cannot be read, is no JSON, or holds no valid plan.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"plan {str(path)!r} cannot be read ({error.strerror}): give a JSON file") from error
        except RecursionError as error:
            raise InputError(f"plan {str(path)!r} is nested too deeply: {error}") from error
        except ValueError as error:
            raise InputError(f"plan {str(path)!r} is not JSON: {error}") from error
        try:
            return cls.from_dict(values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def check_depth(plan: CompressionPlan, depth: int) -> None:
    """Makes sure that the plan was made for a model of `depth` blocks.

    Raises:
        InputError: it was made for another depth.
    """
    if plan.depth != depth:
        raise InputError(f"plan: depth={plan.depth}, but the model has {depth} blocks: give a plan for depth {depth}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_index(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{name}={value!r}: a whole number of 0 or more is needed")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name}={value!r}: one of {', '.join(choices)} is needed")


def _sorted_items(name: str, items: Any, kind: type) -> tuple:
    if not isinstance(items, (tuple, list)):
        raise InputError(f"plan: {name}={items!r}: a list of {kind.__name__} is needed")
    for item in items:
        if not isinstance(item, kind):
            raise InputError(f"plan: {name} holds {item!r}: only {kind.__name__} is accepted")
    return tuple(sorted(items))


def _entries(name: str, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    entries = values.get(name, [])
    if not isinstance(entries, list):
        raise InputError(f"plan: {name}={entries!r}: a list is needed")
    return [(f"plan: {name}[{index}]", entry) for index, entry in enumerate(entries)]


def _check_keys(where: str, values: Any, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    known = ", ".join((*required, *optional))
    if not isinstance(values, Mapping):
        raise InputError(f"{where} is {values!r}: an object with the keys {known} is needed")
    for key in values:
        if key not in required and key not in optional:
            raise InputError(f"{where} has the unknown key {key!r}: the keys are {known}")
    for key in required:
        if key not in values:
            raise InputError(f"{where} lacks the key {key!r}: the keys are {known}")
