# SPDX-License-Identifier: Apache-2.0
"""Labels of two data sets in the same numbers: a class is known by its name, not by its place in a list."""

from dataclasses import replace

import torch

from ..errors import InputError
from ..evaluation.classification import classes_by_name
from .comparison import LabelledRows


def in_same_numbers(training: LabelledRows, evaluation: LabelledRows) -> tuple[LabelledRows, tuple[str, ...]]:
    """`training` with the labels that `evaluation` has for classes of the same names, if both have names.

    Its other classes are numbered after those of `evaluation`.

    Returns:
        The training images, and the classes of evaluation images that none of the training names means.

    Raises:
        InputError: a name that means several classes.
    """
    ours, theirs = training.class_names, evaluation.class_names
    if ours is None or theirs is None or ours == theirs or training.labels is None or evaluation.labels is None:
        return training, ()
    numbers = torch.arange(len(ours)) + len(theirs)
    missing = []
    for label, found in enumerate(classes_by_name(theirs, dict(enumerate(ours)))):
        if len(found) > 1 or (found and numbers[found[0]] < len(theirs)):
            raise InputError(
                f"--label_column: the class names of the two splits differ, and {theirs[label]!r} means several "
                "classes; names that are there once are accepted"
            )
        if found:
            numbers[found[0]] = label
        elif (evaluation.labels == label).any():
            missing.append(theirs[label])
    return replace(training, labels=numbers[training.labels], class_names=(*theirs, *ours)), tuple(missing)


def shares_unnamed_labels(training: LabelledRows, evaluation: LabelledRows) -> bool:
    """Whether labels of two data sets are compared as numbers, for want of names."""
    unnamed = training.class_names is None or evaluation.class_names is None
    return unnamed and training.labels is not None and evaluation.labels is not None
