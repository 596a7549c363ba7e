# SPDX-License-Identifier: Apache-2.0
"""Work for the main process alone, whose failure every process learns of."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


Result = TypeVar("Result")


def on_main(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """`action()` in the main process; all processes wait for it and get what it returns, or raise what it raised.

    A main process that stopped by itself would leave the others waiting for it. Call it in all processes.

    Raises:
        Exception: what `action` raised; elsewhere than in the main process an exception from outside this package
            comes as a `RuntimeError` with its name and message.
    """
    if accelerator.num_processes == 1:
        return action()
    accelerator.wait_for_everyone()
    outcome: list[Any] = [None, None, None]
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except Exception as caught:
            error = caught
            ours = type(error).__module__.startswith("hf_simprune.")
            outcome[1:] = [type(error), str(error)] if ours else [RuntimeError, f"{type(error).__name__}: {error}"]
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    result, kind, message = outcome
    if kind is not None:
        raise kind(message)
    return result
