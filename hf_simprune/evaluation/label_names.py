# SPDX-License-Identifier: Apache-2.0
"""Labels of two data sets in the same numbers: a class is known by its name, not by its place in a list."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .classification import classes_by_name


UNNAMED_LABELS = "labels: {} and {} do not both name their classes; equal numbers are taken to be equal classes"


def numbers_by_name(names: Sequence[str], other: Sequence[str]) -> tuple[Tensor, list[int]]:
    """What number each class of one data set has among the classes of another, told by their names.

    Args:
        names: of the classes to be numbered.
        other: names whose numbers are taken.

    Returns:
        (len(names),) numbers, those of classes that `other` lacks beginning with len(other); and the classes of
        `other` that `names` lacks.

    Raises:
        InputError: a name means several classes, in lists that differ.
    """
    if list(names) == list(other):
        return torch.arange(len(names)), []
    numbers = torch.arange(len(names)) + len(other)
    missing = []
    for label, found in enumerate(classes_by_name(other, dict(enumerate(names)))):
        if len(found) > 1 or (found and numbers[found[0]] < len(other)):
            raise InputError(
                f"--label_column: the class names of the two splits differ, and {other[label]!r} means several "
                "classes; names that are there once are accepted"
            )
        if found:
            numbers[found[0]] = label
        else:
            missing.append(label)
    return numbers, missing
