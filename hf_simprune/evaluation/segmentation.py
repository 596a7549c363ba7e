# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation by a linear layer on frozen patch tokens.

Every patch gets class logits by one linear layer; they are enlarged bilinearly to the size of the mask. The measure is
the mean over classes of intersection over union, summed over all images first.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class LinearSegmenter:
    """((tokens - mean) / deviation) @ weight + bias on a grid of (rows, columns) patches.

    Attributes:
        mean, deviation: (D,) of the training tokens.
        weight: (D, classes); bias: (classes,).
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor
    grid: tuple[int, int]

    def logits(self, tokens: Tensor) -> Tensor:
        """(N, classes, rows, columns) of patch tokens (N, rows * columns, D)."""
        scores = ((tokens.to(self.weight) - self.mean) / self.deviation) @ self.weight + self.bias
        return scores.transpose(1, 2).unflatten(2, self.grid)

    def predict(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """(N, height, width) classes at the size of a mask."""
        return F.interpolate(self.logits(tokens), size, mode="bilinear", align_corners=False).argmax(dim=1)


@dataclass(frozen=True)
class SegmentationResult:
    """How well the classes of the test pixels are found.

    Attributes:
        miou: mean intersection over union, and (low, high) its 95 % bootstrap interval over images.
        per_class: (classes,) intersection over union; nan where a class never occurs.
        confusion: (N, classes, classes) pixels of each image, by true class and given class.
    """

    miou: float
    interval: tuple[float, float]
    per_class: Tensor
    confusion: Tensor


@torch.inference_mode()
def patch_tokens(dense: Callable[[Tensor], Tensor], pixel_values: Iterable[Tensor]) -> Tensor:
    """Frozen patch tokens (N, patches, D), fp32 on the CPU, of batches of pixels (B, C, H, W).

    Args:
        dense: pixels to patch tokens (B, patches, D), such as an adapter's blocks and then `adapter.dense`.
    """
    batches = [dense(batch).float().cpu() for batch in pixel_values]
    if not batches:
        raise InputError("there are no images to take patch tokens of; at least one is needed")
    return torch.cat(batches)


def whole_patches(height: int, width: int, patch: tuple[int, int]) -> tuple[int, int]:
    """The size nearest to (height, width) that is made of whole patches, at least one each way."""
    return max(1, round(height / patch[0])) * patch[0], max(1, round(width / patch[1])) * patch[1]


def fit_segmenter(
    tokens: Tensor,
    masks: Tensor,
    grid: tuple[int, int],
    num_classes: int,
    ignore_index: int = 255,
    steps: int = 400,
    batch_size: int = 16,
    learning_rate: float = 1e-2,
    weight_decay: float = 1e-2,
    stride: int = 4,
    seed: int = 0,
) -> LinearSegmenter:
    """Train the linear layer with AdamW and a cosine learning rate; the same seed draws the same batches.

    Args:
        tokens: (N, rows * columns, D); grid: (rows, columns).
        masks: (N, H, W) integers; pixels of `ignore_index` do not count.
        batch_size: images a step.
        stride: every how many pixels of the mask the loss looks, each way.

    Raises:
        InputError: if shapes do not fit or a mask holds a class outside 0..num_classes-1.
    """
    _check(tokens, masks, grid, num_classes, ignore_index)
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens.float()
    flat = tokens.flatten(0, 1)
    mean, deviation = flat.mean(dim=0), flat.std(dim=0).clamp_min(1e-6)
    weight = torch.zeros(tokens.shape[2], num_classes, requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    segmenter = LinearSegmenter(mean, deviation, weight, bias, grid)
    thinned = [max(1, side // stride) for side in masks.shape[1:]]
    targets = F.interpolate(masks[:, None].float(), thinned, mode="nearest-exact")[:, 0].long()
    optimizer = torch.optim.AdamW([weight, bias], lr=learning_rate, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randperm(len(tokens), generator=generator)[:batch_size]
            scores = F.interpolate(segmenter.logits(tokens[rows]), thinned, mode="bilinear")
            loss = F.cross_entropy(scores, targets[rows], ignore_index=ignore_index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return LinearSegmenter(mean, deviation, weight.detach(), bias.detach(), grid)


def evaluate_segmentation(
    segmenter: LinearSegmenter, tokens: Tensor, masks: Tensor, ignore_index: int = 255, seed: int = 0
) -> SegmentationResult:
    """mIoU of a trained segmenter at the full size of the masks.

    Args:
        tokens: (N, rows * columns, D); masks: (N, H, W).
        seed: of the bootstrap.
    """
    num_classes = len(segmenter.bias)
    _check(tokens, masks, segmenter.grid, num_classes, ignore_index)
    confusion = torch.stack(
        [
            confusion_matrix(segmenter.predict(token[None], mask.shape)[0], mask, num_classes, ignore_index)
            for token, mask in zip(tokens, masks)
        ]
    )
    draws = _draws(len(confusion), seed)
    low, high = torch.quantile(_resampled_miou(confusion, draws), torch.tensor([0.025, 0.975]).double()).tolist()
    per_class = class_iou(confusion.sum(dim=0))
    return SegmentationResult(per_class.nanmean().item(), (low, high), per_class, confusion)


def miou_difference(a: SegmentationResult, b: SegmentationResult, seed: int = 0) -> tuple[float, float, float]:
    """mIoU of `a` minus that of `b` on the same images, with the paired 95 % interval: (difference, low, high)."""
    if a.confusion.shape != b.confusion.shape:
        raise InputError("the two segmentations are not of the same images and classes")
    draws = _draws(len(a.confusion), seed)
    differences = _resampled_miou(a.confusion, draws) - _resampled_miou(b.confusion, draws)
    low, high = torch.quantile(differences, torch.tensor([0.025, 0.975]).double()).tolist()
    return a.miou - b.miou, low, high


def confusion_matrix(predicted: Tensor, mask: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """(classes, classes) int64 pixels by true class (row) and given class (column), without the ignored ones."""
    counted = mask != ignore_index
    pairs = mask[counted].long() * num_classes + predicted[counted]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(confusion: Tensor) -> Tensor:
    """(…, classes) float64 intersection over union of (…, classes, classes) counts; nan where a class never occurs."""
    hits = confusion.diagonal(dim1=-2, dim2=-1).double()
    union = confusion.sum(dim=-1) + confusion.sum(dim=-2) - hits
    return torch.where(union > 0, hits / union, torch.nan)


def _draws(images: int, seed: int, resamples: int = 2_000) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(images, (resamples, images), generator=generator)


def _resampled_miou(confusion: Tensor, draws: Tensor) -> Tensor:
    times = F.one_hot(draws, len(confusion)).sum(dim=1).double()  # how often each image is drawn
    counts = (times @ confusion.flatten(1).double()).unflatten(1, confusion.shape[1:])
    return class_iou(counts).nanmean(dim=1)


def _check(tokens: Tensor, masks: Tensor, grid: tuple[int, int], num_classes: int, ignore_index: int) -> None:
    if tokens.ndim != 3 or masks.ndim != 3 or len(tokens) != len(masks) or tokens.shape[1] != grid[0] * grid[1]:
        raise InputError(
            f"segmentation: tokens of shape {tuple(tokens.shape)} on a grid of {grid} with masks of shape "
            f"{tuple(masks.shape)}; (N, rows * columns, width) and (N, height, width) are needed"
        )
    classes = masks[masks != ignore_index]
    if len(classes) == 0:
        raise InputError(f"segmentation: every pixel of the masks is ignore_index={ignore_index}")
    if classes.min() < 0 or classes.max() >= num_classes:
        raise InputError(
            f"segmentation: the masks hold classes {int(classes.min())} to {int(classes.max())}; 0 to "
            f"{num_classes - 1} and ignore_index={ignore_index} are accepted"
        )
