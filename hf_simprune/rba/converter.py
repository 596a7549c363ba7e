# SPDX-License-Identifier: Apache-2.0
"""Model, plan and maps to the compressed model: a stock class wherever one can say it."""

from transformers import PreTrainedModel

from .adapters import adapter_for
from .maps import FittedMaps
from .own_conversion import OWN_CLASSES, convert_to_own
from .plan import CompressionPlan
from .stock_conversion import convert_to_stock, fits_stock


def convert(model: PreTrainedModel, plan: CompressionPlan, maps: FittedMaps) -> PreTrainedModel:
    """The compressed model, in eval mode; `model` stays as it is.

    Where no map is left in it, neither of the plan nor of `model`, it is of the stock class with fewer layers, else of
    a class of this package, which `hf_simprune.models.sharing.save_with_code` saves so that it loads without the
    package.

    Args:
        model: A model of a supported family.
        plan: For a model of this depth.
        maps: The fitted map of every span and half of the plan.

    Raises:
        InputError: another depth, an unsupported family, or a map this family cannot have.
    """
    if fits_stock(adapter_for(model), plan):
        return convert_to_stock(model, plan, maps)
    return convert_to_own(model, plan, maps)


def can_hold_maps(model: PreTrainedModel) -> bool:
    """Whether a plan for `model` may have more than folds and identities."""
    return type(model) in OWN_CLASSES
