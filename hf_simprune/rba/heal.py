# SPDX-License-Identifier: Apache-2.0
"""Label-free distillation of a compressed network from the original; few parameters move, so few images suffice."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..errors import InputError, TrainingError
from .adapters import Adapter, adapter_for, module_forward
from .adapters.base import BOTH_HALVES
from .calibration import CalibrationSet, ImageReader
from .cost import kl_logits, relative_squared_error
from .plan import CompressionPlan


_LEAST_AREA = 0.35  # of a crop, as a share of the image
_ASPECTS = (3 / 4, 4 / 3)
_WARMUP = 0.1  # share of the steps


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    images: CalibrationSet,
    steps: int,
    *,
    plan: CompressionPlan,
    learning_rate: float = 3e-4,
    batch_size: int = 32,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> list[float]:
    """Train the compressed network, in place, to give the original's outputs on augmented images.

    AdamW (no weight decay, linear warm-up over a tenth of the steps, then cosine) moves `healed_parameters` only. The
    loss is KL of the logits, or without a classifier the relative squared error of the features. Images are randomly
    cropped, resized and flipped; both networks see the same crop and stay in eval mode. Arithmetic is fp32, the
    result has the student's own precision.

    Args:
        student: what `plan` made of `teacher`, both in eval mode.
        images, indices: rows to train on; the fit rows if left out, so that the selection rows can tell whether it
            helped.
        accelerator: shares each batch among its processes.

    Returns:
        The loss of every step, before it.

    Raises:
        InputError: fewer than 1 step, a learning rate or batch size that is not positive, or no readable image.
        TrainingError: the loss is not finite; the student is as it was.
    """
    if steps < 1 or batch_size < 1 or not learning_rate > 0:
        raise InputError(
            f"--heal_steps {steps}, batch_size {batch_size}, learning_rate {learning_rate}: all must be above 0"
        )
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    precision = student.dtype
    network: nn.Module = student  # whose own `to` is declared to take no type
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    wanted_gradient = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    healed = healed_parameters(student, teacher, plan)
    student.requires_grad_(False).float()
    for parameter in healed.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(healed.values(), lr=learning_rate, weight_decay=0.0)
    pair = adapter_for(student), adapter_for(teacher)
    history: list[float] = []
    try:
        size = _prepared_size(images.reader, pair[0])
        batches = _batches(images.reader, indices or images.fit, size, batch_size, seed, rank, world)
        for step in (bar := tqdm(range(steps), desc="healing", disable=not progress or rank > 0, leave=False)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * _schedule(step, steps)
            history.append(_step(optimizer, pair, next(batches), batch_size, accelerator))
            bar.set_postfix(loss=f"{history[-1]:.4f}")
    except BaseException:
        network.to(precision)
        _put_back(student, before, wanted_gradient)
        raise
    network.to(precision)
    _put_back(student, {}, wanted_gradient)
    return history


def healed_parameters(
    student: PreTrainedModel, teacher: PreTrainedModel, plan: CompressionPlan
) -> dict[str, nn.Parameter]:
    """What `heal` moves, by name: layer norms and biases of the vision tower's blocks, its final norm, and all that
    stands in for something that was replaced (maps, and the linear layers that took a fold in)."""
    adapter, original = adapter_for(student), adapter_for(teacher)
    chosen: set[int] = set()
    for module in adapter.tower.modules():
        if isinstance(module, nn.LayerNorm):
            chosen |= {id(parameter) for parameter in module.parameters()}
    stock_names = _block_parameter_names(original)
    for number, block in enumerate(adapter.layers):
        for name, parameter in block.named_parameters():
            is_map = not adapter.is_block(number) or name not in stock_names
            if is_map or name.endswith("bias"):
                chosen.add(id(parameter))
    for span in plan.spans:
        if span.map == "fold":
            chosen |= {id(p) for p in adapter.mlp_output(position_after(plan, span.start - 1)).parameters()}
    return {name: parameter for name, parameter in student.named_parameters() if id(parameter) in chosen}


def position_after(plan: CompressionPlan, block: int) -> int:
    """Where kept block `block` of the original is in the compressed network."""
    modules = sum(span.end <= block and span.map not in ("fold", "identity") for span in plan.spans)
    return block - sum(removed < block for removed in plan.removed_blocks) + modules


def random_crop(image: np.ndarray, size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """A random part of an image, uint8 (H, W, 3), resized to `size` (H, W) and mirrored half of the time.

    35 to 100 % of the area, width over height 3/4 to 4/3.
    """
    height, width = image.shape[:2]
    area = height * width * generator.uniform(_LEAST_AREA, 1)
    aspect = math.exp(generator.uniform(math.log(_ASPECTS[0]), math.log(_ASPECTS[1])))
    w, h = (min(round(math.sqrt(area * aspect)), width), min(round(math.sqrt(area / aspect)), height))
    w, h = max(w, 1), max(h, 1)
    left, top = generator.integers(width - w + 1), generator.integers(height - h + 1)
    box = (left, top, left + w, top + h)
    crop = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(crop)
    return pixels[:, ::-1].copy() if generator.random() < 0.5 else pixels


def _block_parameter_names(adapter: Adapter) -> set[str]:
    """Names of the parameters of the blocks that have nothing replaced."""
    full = (block for b, block in enumerate(adapter.layers) if adapter.halves(b) == BOTH_HALVES)
    return {name for block in full for name, _ in block.named_parameters()}


def _prepared_size(reader: ImageReader, adapter: Adapter) -> tuple[int, int]:
    """(H, W) of the images as the processor gives them, which need not be the size the network is configured for."""
    height, width = reader.prepare([np.zeros((*adapter.image_size, 3), dtype=np.uint8)]).shape[-2:]
    return height, width


def _batches(
    reader: ImageReader,
    indices: Sequence[int],
    size: tuple[int, int],
    batch_size: int,
    seed: int,
    rank: int,
    world: int,
) -> Iterator[Tensor | None]:
    """This process's part of one batch after the other, epoch by epoch in a new order; None for an empty part."""
    generator = np.random.default_rng(seed)
    queue: list[int] = []
    while True:
        while len(queue) < batch_size:
            queue += generator.permutation(indices).tolist()
        batch, queue = queue[:batch_size], queue[batch_size:]
        crops = []
        for place, index in enumerate(batch):
            # every process draws for every image, so that all stay in step
            drawn = np.random.default_rng(generator.integers(2**63))
            if place % world == rank and (pixels := reader.pixels_or_none(index)) is not None:
                crops.append(random_crop(pixels, size, drawn))
        if len(reader.unreadable.intersection(indices)) == len(set(indices)):
            raise InputError(f"--heal_steps: none of the {len(indices)} images can be read")
        yield reader.prepare(crops, do_resize=False, do_center_crop=False) if crops else None


def _step(
    optimizer: torch.optim.Optimizer,
    pair: tuple[Adapter, Adapter],
    pixel_values: Tensor | None,
    batch_size: int,
    accelerator: Accelerator | None,
) -> float:
    """One step on a batch shared by all processes; its loss."""
    student, teacher = pair
    optimizer.zero_grad()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loss = torch.zeros((), device=parameters[0].device)
    if pixel_values is not None:
        pixel_values = pixel_values.to(loss.device)
        with torch.no_grad():
            target = module_forward(teacher, pixel_values.to(teacher.model.device))
        output = module_forward(student, pixel_values)
        distance = kl_logits if student.head == "classifier" else relative_squared_error
        loss = distance(target.to(output.device), output).sum() / batch_size
        loss.backward()
    value = loss.detach()
    if accelerator is not None and accelerator.num_processes > 1:
        value = accelerator.reduce(value, "sum")
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(gradient, "sum")
    if not math.isfinite(value.item()):
        raise TrainingError(f"healing: the loss is {value.item()}; the compressed network is as it was before")
    optimizer.step()
    return value.item()


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up, then a cosine to 0."""
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def _put_back(student: PreTrainedModel, values: dict[str, Tensor], wanted_gradient: dict[str, bool]) -> None:
    for name, parameter in student.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(wanted_gradient[name])
        if name in values:
            parameter.copy_(values[name])
