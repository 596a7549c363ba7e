# SPDX-License-Identifier: Apache-2.0
"""What the trainer asks of the place its crops come from."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ..errors import InputError
from .engine import Views


class OtherReadersError(InputError):
    """The state is of another stream, or of readers that shared it differently: nobody can go on in its middle."""


class ViewSource(Protocol):
    """Where crops come from. `batches(start)` yields the micro-batches of one optimiser step after another, beginning
    with the `start`-th; `views` turns one of them into normalised crops on the device. `state_dict` says in plain
    numbers where this process stands after the micro-batches handed out; `load_state_dict`, called before `batches`,
    goes back there. A source whose order is a function of the step has the state {}."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def begin_next_epoch(self, states: Sequence[dict[str, Any]]) -> int:
        """Go on at the start of the epoch after all those that `states` are in; returns its number, from 0."""
        ...

    def batches(self, start: int) -> Iterator[Sequence[Any]]: ...

    def views(self, batch: Any) -> Views: ...
