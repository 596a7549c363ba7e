# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's `trainer_state.json` must hold: checked before it is believed, as anyone may have written it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeGuard

from .window import Window


def is_count(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number from 0 on; bool is no number here."""
    return type(value) is int and 0 <= value < 1 << 62


def wrong_field(state: Any) -> str | None:
    """The first field that is missing or is not what it should be, or None for a state that can be gone on from."""
    if not isinstance(state, Mapping):
        return "the whole of it"
    return next((name for name, valid in _FIELDS.items() if name not in state or not valid(state[name])), None)


def is_place(value: Any) -> bool:
    """Whether it is a `Place` of `ShuffledStream`."""
    if not isinstance(value, Mapping) or not all(map(is_count, map(value.get, _PLACE_COUNTS))):
        return False
    lanes = value.get("open")
    lists = isinstance(lanes, list) and all(isinstance(lane, list) and len(lane) == 2 for lane in lanes)
    return lists and all(is_count(number) for lane in lanes or () for number in lane)


def _is_source(value: Any) -> bool:
    """Of every process: {} or where it stands in a stream, which its own source looks at more closely."""
    if not isinstance(value, list) or not value or not all(isinstance(part, Mapping) for part in value):
        return False
    return all(_are_places(part["places"]) for part in value if "places" in part)


def _are_places(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(is_place, value))


def _is_window(value: Any) -> bool:
    if not isinstance(value, Mapping) or set(value) != {field.name for field in fields(Window)}:
        return False
    parts, numbers = value["parts"], [number for name, number in value.items() if name != "parts"]
    if not is_count(value["steps"]) or not isinstance(parts, dict):
        return False
    return _are_numbers([*numbers, *parts.values()])


def _are_numbers(values: Any) -> bool:
    return all(type(value) in (int, float) for value in values)


def _is_monitor(value: Any) -> bool:
    names = ("uniform_steps", "one_prototype_steps")
    return isinstance(value, Mapping) and all(map(is_count, map(value.get, names)))


def _is_scaler(value: Any) -> bool:
    """None without fp16, {} of a scaler that is switched off."""
    if not isinstance(value, dict):
        return value is None
    return (not value or set(value) >= _SCALER_NUMBERS) and _are_numbers(value.values())


def _is_line(text: str) -> bool:
    """Whether it is a line of `metrics.jsonl`."""
    try:
        found = json.loads(text.encode())
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and is_count(found.get("step")) and text.endswith("\n")


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


_SCALER_NUMBERS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
_PLACE_COUNTS = ("epoch", "block", "taken", "next", "turn")
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": is_count,
    "batches_seen": is_count,
    "source": _is_source,
    "skipped_in_a_row": is_count,
    "bad_indices": lambda value: _is_list_of(int)(value) or _is_list_of(str)(value),
    "window": _is_window,
    "monitor": _is_monitor,
    "scaler": _is_scaler,
    "identity": lambda value: isinstance(value, dict),
    "unwritten_metrics": lambda value: _is_list_of(str)(value) and all(map(_is_line, value)),
}
