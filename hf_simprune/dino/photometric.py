# SPDX-License-Identifier: Apache-2.0
"""Colour, blur and solarisation as tensor functions that only *apply* parameters drawn elsewhere.

Definitions follow Pillow (which torchvision's PIL backend calls) without its rounding to whole levels after every
step. All functions work in place on float32 crops (n, 3, H, W) in [0, 255] with one parameter an example, and what an
example becomes does not depend, in any bit, on the examples beside it: everything is elementwise, and the one sum
over pixels (contrast) adds whole numbers exactly.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .augmentation import GLOBAL_VIEWS, SOLARIZE_THRESHOLD, AugmentationConfig
from .batch import Batch, ViewParameters


# ITU-R 601-2 luma, as in Pillow's convert("L")
_LUMA = (0.299, 0.587, 0.114)
# On a CPU a chunk of crops and its scratch space should stay in the second-level cache.
_CPU_CHUNK_PIXELS = 96 * 1024
_COPY_BY_ROW = 4096  # values from which a plain copy of each row beats index_copy_, which goes value by value on a CPU
_MIN_SIGMA = 0.2  # below it the kernel is (0, 1, 0) to 4e-6
_KERNEL_REACH = 2.7  # standard deviations kept on each side; the rest of the mass is 0.7 %


def luminance(x: Tensor) -> Tensor:
    """Grey value (n, H, W) of crops (n, 3, H, W)."""
    grey = x[:, 0] * _LUMA[0]
    return grey.add_(x[:, 1], alpha=_LUMA[1]).add_(x[:, 2], alpha=_LUMA[2])


def adjust_brightness_(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with black by `factor` (n,)."""
    return x.mul_(_per_example(factor)).clamp_(max=255)


def adjust_contrast_(x: Tensor, factor: Tensor) -> Tensor:
    """Blend by `factor` (n,) with the mean of the grey image, which Pillow rounds to a whole level."""
    rows = luminance(x).round_().sum(-1)  # whole numbers: exact in float32, whatever the order of the sum
    mean = rows.sum(-1, dtype=torch.float64).div_(x.shape[-2] * x.shape[-1]).add_(0.5).floor_().float()
    return x.mul_(_per_example(factor)).add_(_per_example((1 - factor) * mean)).clamp_(0, 255)


def adjust_saturation_(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image by `factor` (n,)."""
    grey = luminance(x).mul_((1 - factor).view(-1, 1, 1))
    return x.mul_(_per_example(factor)).add_(grey.unsqueeze(1)).clamp_(0, 255)


def shift_hue(x: Tensor, turns: Tensor, max_turns: float = 0.5) -> Tensor:
    """Rotate the hue of HSV by `turns` (n,) of the colour circle, |turns| <= `max_turns`. Returns new crops.

    For a rotation by d in [0, 1] sixths of the circle no HSV is needed: with m and M the smallest and largest channel
    of a pixel, R' = clamp(R - G + (2d - 1) B + (1 - d)(M + m), m, M), and G' and B' by cyclic exchange; for a negative
    one G and B change places. Larger rotations are several small ones, as many as `max_turns` asks for.
    """
    passes = max(1, math.ceil(6 * max_turns - 1e-9))
    sixths = (turns * (6 / passes)).view(-1, 1, 1)
    weight_next = (-sixths).clamp_(min=0).mul_(2).sub_(1)
    weight_previous = sixths.clamp(min=0).mul_(2).sub_(1)
    for _ in range(passes):
        red, green, blue = x.unbind(1)
        low, high = x.amin(1), x.amax(1)
        base = (low + high).mul_(1 - sixths.abs())
        x = torch.empty_like(x)
        triples = ((red, green, blue), (green, blue, red), (blue, red, green))
        for new, (own, following, previous) in zip(x.unbind(1), triples):
            torch.add(own, base, out=new)
            new.addcmul_(following, weight_next).addcmul_(previous, weight_previous)
            torch.clamp(new, low, high, out=new)
    return x


def to_grayscale_(x: Tensor) -> Tensor:
    """Every channel becomes the grey value."""
    return x.copy_(luminance(x).unsqueeze(1).expand_as(x))


def solarize_(x: Tensor) -> Tensor:
    """Invert values from 128 upwards.

    min(x, 255 - x) is the same thing on whole levels; between 127.5 and 128 it differs by less than one level.
    """
    return torch.minimum(x, torch.rsub(x, 2 * SOLARIZE_THRESHOLD - 1), out=x)


def blur_kernels(sigma: np.ndarray) -> np.ndarray:
    """One half of each example's Gaussian kernel: (n, radius + 1) float32, the centre first, the whole sums to 1.

    `radius` is the largest one needed; kernels of smaller `sigma` (n,) end in zeros.
    """
    sigma = np.maximum(sigma.astype(np.float64), _MIN_SIGMA)[:, None]
    radius = np.ceil(_KERNEL_REACH * sigma)
    distance = np.arange(int(radius.max()) + 1)
    weights = np.exp(-0.5 * (distance / sigma) ** 2) * (distance <= radius)
    return (weights / (2 * weights.sum(1, keepdims=True) - weights[:, :1])).astype(np.float32)


def gaussian_blur(x: Tensor, kernels: Tensor) -> Tensor:
    """Separable Gaussian blur by `kernels` (n, radius + 1) of `blur_kernels`; edge pixels are repeated outwards.

    Returns new crops.
    """
    n, channels, height, width = x.shape
    radius = kernels.shape[1] - 1
    taps = kernels.T.reshape(radius + 1, n, 1, 1)
    padded = functional.pad(x, (radius,) * 4, mode="replicate").flatten(2)
    # In the flattened plane a shift by k rows is a shift by k * stride. The shift by columns also fills the gaps
    # between rows, which nobody reads.
    stride = width + 2 * radius
    rows = _weighted_shifts(padded, taps, stride, x.new_empty(n, channels, height * stride))
    columns = x.new_empty(n, channels, height * stride)
    _weighted_shifts(rows, taps, 1, columns[..., : height * stride - 2 * radius])
    return columns.view(n, channels, height, stride)[..., :width].contiguous()


def _weighted_shifts(flat: Tensor, taps: Tensor, step: int, out: Tensor) -> Tensor:
    """Write sum over k of taps[k] * (flat shifted by +k steps and by -k steps) into `out`, (n, 3, length)."""
    length, radius = out.shape[-1], len(taps) - 1

    def shifted(k: int) -> Tensor:
        return flat.narrow(-1, (radius + k) * step, length)

    torch.mul(shifted(0), taps[0], out=out)
    pair = flat.new_empty(out.shape)
    for k in range(1, radius + 1):
        torch.add(shifted(-k), shifted(k), out=pair)
        out.addcmul_(pair, taps[k])
    return out


def _per_example(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def apply_photometric(
    batch: Batch, cfg: AugmentationConfig, device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """Flip, jitter, grey, blur, solarise and normalise all crops of a batch by the parameters it carries.

    Returns float32 crops on `device`: global (2B, 3, H, W), view-major, and local (L·B, 3, h, w), crop-major, or None
    without local crops. The random choices were made by `augmentation.sample_parameters`.
    """
    device = torch.device(device)
    local = None
    if batch.local_crops is not None:
        local = _transform(batch.local_crops, batch.parameters.views(slice(GLOBAL_VIEWS, None)), cfg, device)
    return _transform(batch.global_crops, batch.parameters.views(slice(GLOBAL_VIEWS)), cfg, device), local


def _transform(crops: Tensor, parameters: ViewParameters, cfg: AugmentationConfig, device: torch.device) -> Tensor:
    crops = crops.to(device, non_blocking=True).flatten(0, 1)
    n, _, height, width = crops.shape
    out = torch.empty(crops.shape, dtype=torch.float32, device=device)
    scale = torch.tensor([1 / (255 * s) for s in cfg.image_std], device=device).view(3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(cfg.image_mean, cfg.image_std)], device=device).view(3, 1, 1)
    size = max(1, _CPU_CHUNK_PIXELS // (height * width)) if device.type == "cpu" else n
    # Neighbours in this order mostly share their jitter operations, so chunks need few copies.
    order = np.lexsort((*parameters.order.T[::-1], ~parameters.jitter))
    for rows in np.split(order, range(size, n, size)):
        index = torch.from_numpy(rows).to(device, non_blocking=True)
        chunk = _on_subset(crops.index_select(0, index), parameters.flip[rows], partial(torch.flip, dims=(-1,)))
        _write_rows(out, rows, _recolour(chunk.float(), parameters.rows(rows), cfg).mul_(scale).add_(shift))
    return out


def _recolour(x: Tensor, parameters: ViewParameters, cfg: AugmentationConfig) -> Tensor:
    """Everything between flip and normalisation, for crops x (n, 3, H, W) and their n parameters."""
    hue = partial(shift_hue, max_turns=cfg.color_jitter[3])
    operations = (adjust_brightness_, adjust_contrast_, adjust_saturation_, hue)
    active = [number for number in range(4) if cfg.color_jitter[number] > 0]
    for slot, number in product(range(4), active):
        chosen = parameters.jitter & (parameters.order[:, slot] == number)
        x = _on_subset(x, chosen, operations[number], parameters.factors[:, number])
    x = _on_subset(x, parameters.grayscale, to_grayscale_)
    blurred = parameters.blur_sigma > _MIN_SIGMA
    if blurred.any():
        x = _on_subset(x, blurred, gaussian_blur, blur_kernels(parameters.blur_sigma))
    return _on_subset(x, parameters.solarize, solarize_)


def _on_subset(
    x: Tensor, mask: np.ndarray, operation: Callable[..., Tensor], values: np.ndarray | None = None
) -> Tensor:
    """Apply `operation(crops[, values])` to the examples that `mask` (n,) names, `values` (n, ...) being theirs."""
    chosen = mask.nonzero()[0]
    if len(chosen) == 0:
        return x
    arguments = () if values is None else (torch.from_numpy(values[chosen]).to(x.device, non_blocking=True),)
    if len(chosen) == len(mask):
        return operation(x, *arguments)
    index = torch.from_numpy(chosen).to(x.device, non_blocking=True)
    return _write_rows(x, chosen, operation(x.index_select(0, index), *arguments))


def _write_rows(x: Tensor, rows: np.ndarray, part: Tensor) -> Tensor:
    """x[rows] = part, in place."""
    if x.device.type == "cpu" and part[0].numel() >= _COPY_BY_ROW:
        for row, new in zip(rows.tolist(), part.unbind()):
            x[row].copy_(new)
        return x
    return x.index_copy_(0, torch.from_numpy(rows).to(x.device, non_blocking=True), part)
