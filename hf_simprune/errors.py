# SPDX-License-Identifier: Apache-2.0
"""The exceptions that recipes and the command line print as one line, without a traceback."""


class InputError(ValueError):
    """Bad input. The message is one line that names the option, its value and what would be accepted.

    Recipes and the command line exit with status 2.
    """


class TrainingError(RuntimeError):
    """A run that cannot go on. The message names the step and what was kept; recipes exit with status 1.

    `known_to_one`: the other processes may not know of it, so whichever process meets it says it.
    """

    known_to_one = False


class EvaluationError(RuntimeError):
    """An evaluation that could not be made; raised in all processes. The training goes on without its numbers."""


class TrainingInterrupted(Exception):
    """Ctrl-C or SIGTERM, after a checkpoint was written. The message says how to resume; recipes exit with 130."""
