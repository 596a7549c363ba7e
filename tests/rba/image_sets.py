"""Small random images and calibration sets for the tests of the analysis."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from hf_simprune.evaluation.features import build_image_processor
from hf_simprune.rba.analysis import Analysis
from hf_simprune.rba.calibration import CalibrationSet, ImageReader, ImageSplit

from .conftest import IMAGE_SIZE


PROCESSOR = build_image_processor(IMAGE_SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """uint8 (H, W, 3), smooth enough that patches of one image resemble each other."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return [
        np.asarray(Image.fromarray(image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
        for image in small
    ]


def calibration(fit: int = 12, select: int = 7, seed: int = 0, images: list | None = None) -> CalibrationSet:
    """Rows 0..fit-1 fit, the next `select` ones select; the row numbers are what they are, not shuffled."""
    images = pictures(fit + select, seed) if images is None else images
    split = ImageSplit(tuple(range(fit)), tuple(range(fit, fit + select)))
    return CalibrationSet(ImageReader(images, PROCESSOR), split)


def quiet_model(model: PreTrainedModel, factor: float = 0.3) -> PreTrainedModel:
    """The model with smaller writes in every block, so that costs are neither zero nor hopeless."""
    for name, parameter in model.named_parameters():
        if "layers." in name or "layer." in name:
            parameter.data.mul_(factor if parameter.dim() > 1 else 1.0)
    return model


def summary(analysis: Analysis) -> dict[str, Tensor]:
    """Tensors of an analysis to compare between processes."""
    moments = analysis.moments
    names = [f"h{i}" for i in range(moments.depth + 1)]
    return {
        "count": torch.tensor([moments.count, moments.images], dtype=torch.float64),
        "means": torch.stack([moments.mean(name) for name in names]),
        "products": torch.stack([moments.cov(a, b) for a in names for b in names if a <= b]),
        "folds": torch.stack([moments.cov(f"m{b}", f"h{b + 1}") for b in range(moments.depth)]),
        "even": torch.stack([moments.subset(0).cov(name, name) for name in names]),
        "cosine": moments.cls_cosine,
        "costs": torch.tensor([[entry.cost, entry.relative_error] for entry in analysis.costs.values()]).double(),
    }
