# SPDX-License-Identifier: Apache-2.0
"""Writing a compressed network so that it loads everywhere, and making sure that it does."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, CLIPModel, PreTrainedModel, SiglipModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..errors import TrainingError
from ..models.sharing import save_with_code
from .adapters import adapter_for, module_forward
from .checkpoint import loader_of


logger = logging.get_logger(__name__)

_WITH_TEXT = (CLIPModel, SiglipModel)
_ROUNDINGS = 100  # of the largest output, that two runs of the same weights may differ by


def is_stock(model: PreTrainedModel) -> bool:
    """Whether stock transformers loads it."""
    return type(model).__module__.startswith("transformers.")


def save_model(
    model: PreTrainedModel, processor: BaseImageProcessor, source: str, folder: Path, token: str | None = None
) -> None:
    """Weights, configuration, image processor and, beside a text tower, the tokenizer of `source`."""
    if is_stock(model):
        model.save_pretrained(folder)
    else:
        save_with_code(model, folder)
    processor.save_pretrained(folder)
    if isinstance(model, _WITH_TEXT):
        try:
            AutoTokenizer.from_pretrained(source, token=token).save_pretrained(folder)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            logger.warning(f"no tokenizer is saved beside the text tower, as none can be read from {source}: {reason}")


@torch.no_grad()
def check_reload(model: PreTrainedModel, folder: Path, pixel_values: Tensor) -> None:
    """Load `folder` as a user would and compare with the network in memory.

    Raises:
        TrainingError: another class, a weight that differs in any bit, or an output that differs by more than
            rounding: a matrix product may round differently where a file's bytes lie in memory differently.
    """
    loader = loader_of((AutoConfig.from_pretrained(folder).architectures or [""])[0])
    reloaded = loader.from_pretrained(folder, dtype="auto").eval().to(model.device)
    if type(reloaded) is not type(model):
        raise TrainingError(f"{folder} loads as {type(reloaded).__name__}, not as {type(model).__name__}")
    expected, found = model.state_dict(), reloaded.state_dict()
    wrong = [name for name in expected if name not in found or not torch.equal(expected[name], found[name])]
    wrong += [name for name in found if name not in expected]
    if wrong:
        raise TrainingError(f"{folder}: the saved weights are not those in memory, for example {wrong[0]}")
    before, after = (module_forward(adapter_for(each), pixel_values) for each in (model, reloaded))
    rounding = _ROUNDINGS * torch.finfo(before.dtype).eps * float(before.abs().max())
    if not torch.allclose(before, after, rtol=0, atol=rounding, equal_nan=True):
        raise TrainingError(f"{folder}: the saved network computes something else than the one in memory")


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all weights, tied ones once: what a file of them takes, but for its header."""
    storages = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()}
    return sum(storages.values())
