# SPDX-License-Identifier: Apache-2.0
"""Which spans and halves of a network can be offered for replacement."""

from collections.abc import Sequence

from ..errors import InputError
from .adapters import Adapter
from .plan import HALF_MAPS, SPAN_MAPS, Half, Span


TRAINED_MAPS = ("mlp", "res_mlp")
CLOSED_FORM_MAPS = tuple(kind for kind in SPAN_MAPS if kind not in TRAINED_MAPS)
GRANULARITIES = ("block", "half")


def closed_form_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """`kinds` of span map without repeats; a trained kind is stood in for by "linear", whose cost it is planned with.

    Raises:
        InputError: none, or an unknown one.
    """
    for kind in kinds:
        if kind not in SPAN_MAPS:
            raise InputError(f"--map {kind}: one or several of {', '.join(SPAN_MAPS)} are accepted")
    if not kinds:
        raise InputError(f"--map: one or several of {', '.join(SPAN_MAPS)} are needed")
    return tuple(dict.fromkeys("linear" if kind in TRAINED_MAPS else kind for kind in kinds))


def check_settings(granularity: str, max_span: int, kinds: Sequence[str], rank: int | None, width: int) -> None:
    """Raises InputError for an unknown granularity, an empty span or a rank that is useless or too large."""
    if granularity not in GRANULARITIES:
        raise InputError(f"--granularity {granularity}: one of {', '.join(GRANULARITIES)} is accepted")
    if max_span < 1:
        raise InputError(f"--max_span {max_span}: at least 1 block")
    if rank is not None and not 1 <= rank <= width:
        raise InputError(f"--rank {rank}: 1 to {width} are accepted, the width of this network")
    if rank is not None and "low_rank" not in kinds:
        raise InputError(f"--rank {rank}: only the map low_rank has a rank")


def candidate_items(
    adapter: Adapter,
    kinds: Sequence[str],
    granularity: str = "block",
    max_span: int = 6,
    rank: int | None = None,
    first_block: bool = False,
) -> tuple[Span | Half, ...]:
    """Every span of up to `max_span` blocks with every kind of map, and with granularity "half" every half.

    Block 0 is left out unless `first_block`. Of a network that is already compressed, a span holds at least one block
    with a half in full, a fold goes into a full MLP only, and only full halves are offered.
    """
    first = 0 if first_block else 1
    items: list[Span | Half] = []
    for start in range(first, adapter.depth):
        for end in range(start + 1, min(start + max_span, adapter.depth) + 1):
            if end - start == adapter.depth or not any(adapter.halves(b) for b in range(start, end)):
                continue
            for kind in kinds:
                if kind != "fold" or (start > 0 and "mlp" in adapter.halves(start - 1)):
                    items.append(Span(start, end, kind, rank if kind == "low_rank" else None))
    if granularity == "half":
        items += [
            Half(block, half, kind)
            for block in range(first, adapter.depth)
            for half in adapter.halves(block)
            for kind in HALF_MAPS
        ]
    return tuple(items)
