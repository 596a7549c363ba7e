# SPDX-License-Identifier: Apache-2.0
"""`hf-simprune evaluate`."""

from typing import Any

from ..evaluation.arguments import EVALUATE_OPTIONS, EvaluateArguments, validate_evaluation


OPTIONS = EVALUATE_OPTIONS


def run(args: EvaluateArguments) -> dict[str, Any]:
    """Evaluate; returns the record."""
    validate_evaluation(args)
    from ..evaluation.run import run_evaluate

    return run_evaluate(args)
