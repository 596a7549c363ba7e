# SPDX-License-Identifier: Apache-2.0
"""Frozen features of images, and the image processor that is saved beside a trained backbone."""

import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ViTImageProcessorPil
from transformers.image_processing_utils import BaseImageProcessor

from ..errors import InputError


def build_image_processor(
    image_size: int, image_mean: Sequence[float], image_std: Sequence[float]
) -> ViTImageProcessorPil:
    """The processor for square images: bilinear resize, rescale to 0..1, normalise.

    The saved `preprocessor_config.json` names the class without its backend, so `AutoImageProcessor.from_pretrained`
    reads it with and without torchvision; `backend="pil"` gives this very class, to the last bit.

    Args:
        image_size: side in pixels.
        image_mean: mean of each of the 3 channels, in 0..1.
        image_std: standard deviation of each of the 3 channels, in 0..1.
    """
    if image_size < 1:
        raise InputError(f"image_size={image_size}: must be at least 1 pixel")
    if len(image_mean) != 3 or len(image_std) != 3 or min(image_std) <= 0:
        raise InputError(
            f"image_mean={list(image_mean)}, image_std={list(image_std)}: 3 values each, the deviations above 0"
        )
    return ViTImageProcessorPil(
        size={"height": image_size, "width": image_size}, image_mean=list(image_mean), image_std=list(image_std)
    )


@torch.no_grad()
def extract_features(
    model: PreTrainedModel,
    images: Iterable[Image.Image],
    processor: BaseImageProcessor,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Features of `images` from the last hidden state of any vision transformer, computed on the model's device.

    Modules are put into evaluation mode and back into the mode each was in.

    Args:
        model: returns a `last_hidden_state` of (batch, prefix + patches, D), prefix tokens first.
        images: PIL images of any mode; a generator such as `(row["image"] for row in dataset)` is read once.
        processor: the image processor of the model.
        progress: show a bar on stderr.

    Returns:
        `cls`: (N, D), the first token; `patch_mean`: (N, D), the mean over the patch tokens. Both fp32 on the CPU.

    Raises:
        InputError: if there are no images, or the model returns something else than tokens of patches.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        cls, patch_mean = [], []
        for pixel_values in _pixel_batches(images, processor, batch_size, progress):
            tokens = model(pixel_values.to(model.device, model.dtype)).last_hidden_state.float()
            prefix = _prefix_tokens(tokens, pixel_values, model)
            cls.append(tokens[:, 0].cpu())
            patch_mean.append(tokens[:, prefix:].mean(dim=1).cpu())
    finally:
        for module, training in modes.items():
            module.training = training
    return {"cls": torch.cat(cls), "patch_mean": torch.cat(patch_mean)}


def raw_pixel_features(
    images: Iterable[Image.Image], processor: BaseImageProcessor, batch_size: int = 256, progress: bool = False
) -> Tensor:
    """The pixels a network would see, flattened: the baseline that any learned feature has to beat.

    Returns:
        (N, 3 * height * width) fp32, resized and normalised by `processor`.
    """
    return torch.cat([batch.flatten(1) for batch in _pixel_batches(images, processor, batch_size, progress)])


def _pixel_batches(
    images: Iterable[Image.Image], processor: BaseImageProcessor, batch_size: int, progress: bool
) -> Iterator[Tensor]:
    total = math.ceil(len(images) / batch_size) if isinstance(images, Sized) else None
    # one image at a time, so that only network-sized pixels are held, however large the images are
    stream = (processor(images=[i.convert("RGB")], return_tensors="pt")["pixel_values"][0] for i in images)
    batches = iter(lambda: list(islice(stream, batch_size)), [])
    empty = True
    for batch in tqdm(batches, total=total, desc="features", disable=not progress, leave=False):
        yield torch.stack(batch)
        empty = False
    if empty:
        raise InputError("there are no images to take features of; at least one is needed")


def _prefix_tokens(tokens: Tensor, pixel_values: Tensor, model: PreTrainedModel) -> int:
    """Number of tokens before the patches, from the patch size and the size of this very input."""
    side = model.config.patch_size
    patch_height, patch_width = (side, side) if isinstance(side, int) else side
    patches = (pixel_values.shape[-2] // patch_height) * (pixel_values.shape[-1] // patch_width)
    if tokens.ndim != 3 or tokens.shape[1] <= patches:
        raise InputError(
            f"{type(model).__name__} gives a last_hidden_state of shape {tuple(tokens.shape)} for {patches} patches; "
            "a class token and one token a patch are needed"
        )
    return tokens.shape[1] - patches
