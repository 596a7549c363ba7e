# SPDX-License-Identifier: Apache-2.0
"""Labelled images of two data sets whose equal labels are equal classes."""

from dataclasses import replace

from ..evaluation.label_names import numbers_by_name
from .comparison import LabelledRows


def in_same_numbers(training: LabelledRows, evaluation: LabelledRows) -> tuple[LabelledRows, tuple[str, ...]]:
    """`training` with the labels that `evaluation` has for classes of the same names, if both have names.

    Returns:
        The training images, and the classes of evaluation images that none of the training names means.

    Raises:
        InputError: a name that means several classes.
    """
    ours, theirs = training.class_names, evaluation.class_names
    if ours is None or theirs is None or ours == theirs or training.labels is None or evaluation.labels is None:
        return training, ()
    numbers, missing = numbers_by_name(ours, theirs)
    shown = set(evaluation.labels.tolist())
    unknown = tuple(theirs[label] for label in missing if label in shown)
    return replace(training, labels=numbers[training.labels], class_names=(*theirs, *ours)), unknown


def shares_unnamed_labels(training: LabelledRows, evaluation: LabelledRows) -> bool:
    """Whether labels of two data sets are compared as numbers, for want of names."""
    unnamed = training.class_names is None or evaluation.class_names is None
    return unnamed and training.labels is not None and evaluation.labels is not None
