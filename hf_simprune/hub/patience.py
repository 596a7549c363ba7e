# SPDX-License-Identifier: Apache-2.0
"""Waiting for a Hub that is busy or away for a moment, but not for ever."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub import get_session
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import logging, parse_ratelimit_headers

from .hub_errors import WaitTooLong, status_of


logger = logging.get_logger(__name__)

# In seconds, of one push: the Hub counts requests in windows of five minutes.
LIMIT = 330.0
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0
_PASSING = (408, 409, 412, 429, 500, 502, 503, 504)
_MOST_TRIALS = 6

Result = TypeVar("Result")


def persist(step: Callable[[], Result], may_repeat: Callable[[BaseException], bool]) -> Result:
    """Do `step` until it succeeds or fails for good.

    It is done again after errors that pass (a busy server, one that failed, no answer) if `may_repeat` says so too.

    Raises:
        WaitTooLong: the Hub asks for more patience than there is.
        Exception: what the last trial raised.
    """
    patience = Patience()
    for trials_left in reversed(range(_MOST_TRIALS)):
        try:
            with patience.watching():
                return step()
        except (HTTPError, OSError) as error:
            if not trials_left or not is_passing(error) or not may_repeat(error):
                raise
            patience.wait(error)
    raise AssertionError("the last trial returns or raises")


class Patience:
    """How long one push has waited and may wait still."""

    def __init__(self, limit: float = LIMIT) -> None:
        self.left = limit
        self._own = _FIRST_WAIT
        self._counted: list[Any] = []

    def wait(self, error: BaseException) -> None:
        """Sleep as long as the Hub asked for in `error`, or ever longer.

        Raises:
            WaitTooLong: more than is left.
        """
        response = getattr(error, "response", None)
        seconds = None if response is None else asked_to_wait(response)
        if seconds is None:
            seconds, self._own = self._own, min(2 * self._own, _LONGEST_WAIT)
            self._spend(seconds)
        elif not any(each is response for each in self._counted):
            self._spend(seconds)
        logger.warning(f"The Hub is busy or away: trying again in {seconds:.0f} s.")
        time.sleep(seconds)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what the client waits by itself: it repeats some requests and obeys any `Retry-After`.

        Requests in the block raise [`WaitTooLong`] where a server names a time beyond what is left.
        """
        hooks = get_session().event_hooks["response"]
        hooks.append(self._count)
        try:
            yield
        finally:
            hooks.remove(self._count)

    def _count(self, response: Any) -> None:
        seconds = asked_to_wait(response) if response.is_error else None
        if seconds is not None:
            self._counted.append(response)
            self._spend(seconds)

    def _spend(self, seconds: float) -> None:
        if seconds > self.left:
            raise WaitTooLong(f"{seconds:.0f} s, more than the {self.left:.0f} s that are left of {LIMIT:.0f} s")
        self.left -= seconds


def asked_to_wait(response: Any) -> float | None:
    """Seconds that a refusal asks to wait, None where it names none that can be read."""
    limits = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limits is not None and limits.remaining == 0:
        return float(limits.reset_in_seconds)
    value = response.headers.get("Retry-After", "").strip()
    return float(value) if value.isdigit() else None


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later: no answer, a busy server, or one that failed."""
    status = status_of(error)
    return isinstance(error, HTTPError) if status is None else status in _PASSING
