# SPDX-License-Identifier: Apache-2.0
"""Options left open become numbers, once the number of images and processes is known, and each choice is explained."""

import math
from dataclasses import dataclass

from ..errors import InputError
from .arguments import DinoArguments
from .geometry import Geometry, geometry
from .reduction_choice import check_epochs, without_effect
from .validation import check_batch_size


BASE_LEARNING_RATE = 5e-4
WARMUP_EPOCHS = 10
FREEZE_EPOCHS = 1
RUN_SHARE = 0.2  # a default warm-up or freeze takes at most this share of a run
SMALL_CROP = 64
MAX_GRAD_NORM = 3.0


@dataclass(frozen=True)
class SizedDefaults:
    """Head size, teacher temperature and starting momentum that suit a number of images."""

    images: int
    out_dim: int
    teacher_temp: float
    momentum_teacher: float


# The two ends of `--auto_scale`: between them out_dim (rounded to a power of two) moves on a logarithmic scale, the
# others in proportion to the logarithm of the number of images; outside, the nearer end holds. The large end is DINO's
# published setting for ImageNet. Small sets get fewer prototypes (65,536 cannot be told apart in 10,000 images), a
# sharper teacher, which keeps them from uniform collapse, and one that follows the student more quickly, because
# their runs have fewer steps. LightlyTrain scales the same three.
SMALL_SET = SizedDefaults(images=20_000, out_dim=1_024, teacher_temp=0.02, momentum_teacher=0.99)
LARGE_SET = SizedDefaults(images=1_281_167, out_dim=65_536, teacher_temp=0.04, momentum_teacher=0.996)


@dataclass(frozen=True)
class ResolvedSettings:
    """The numbers of one run. Crop sizes in pixels a side; steps are optimiser steps.

    steps_per_epoch: `None` where the number of images is unknown (a stream without a known length).
    teacher_temp_interval: steps between two changes of the teacher temperature, an epoch or 1; its warm-up lasts
    `warmup_teacher_temp_intervals` of them. max_grad_norm, clip_grad: `None` does not clip.
    notes: one line for each choice that was not given explicitly.
    """

    geometry: Geometry
    num_images: int | None
    world_size: int
    global_batch: int
    steps_per_epoch: int | None
    total_steps: int
    learning_rate: float
    warmup_steps: int
    freeze_last_layer_steps: int
    warmup_teacher_temp_intervals: int
    teacher_temp_interval: int
    max_grad_norm: float | None
    clip_grad: float | None
    out_dim: int
    teacher_temp: float
    momentum_teacher: float
    blur_prob: tuple[float, float, float]
    solarize_prob: tuple[float, float, float]
    notes: tuple[str, ...]

    @property
    def image_size(self) -> int:
        return self.geometry.image_size

    @property
    def patch_size(self) -> int:
        return self.geometry.patch_size

    @property
    def global_crop_size(self) -> int:
        return self.geometry.global_crop_size

    @property
    def local_crop_size(self) -> int:
        return self.geometry.local_crop_size

    @property
    def reduction_layers(self) -> tuple[int, ...]:
        return self.geometry.reduction_layers


def defaults_for_size(num_images: int) -> SizedDefaults:
    """`--auto_scale`: what suits `num_images`, between `SMALL_SET` and `LARGE_SET`."""
    small, large = SMALL_SET, LARGE_SET
    position = math.log(max(num_images, 1) / small.images) / math.log(large.images / small.images)
    position = min(1.0, max(0.0, position))
    out_dim = 2 ** round(math.log2(small.out_dim) + position * math.log2(large.out_dim / small.out_dim))
    teacher_temp = small.teacher_temp + position * (large.teacher_temp - small.teacher_temp)
    momentum = small.momentum_teacher + position * (large.momentum_teacher - small.momentum_teacher)
    return SizedDefaults(num_images, out_dim, round(teacher_temp, 4), round(momentum, 5))


def resolve(args: DinoArguments, num_images: int | None, world_size: int) -> ResolvedSettings:
    """Fill in what the options leave open. `num_images` is `None` for a stream of unknown length.

    Raises:
        InputError: the global batch is larger than the data set, a warm-up longer than the run, a stream of unknown
            length without `--max_steps`, with lengths in epochs or with a method that counts them, a final learning
            rate above the peak.
    """
    notes = without_effect(args)
    sizes = geometry(args)
    if args.architecture is None and args.model_name_or_path is None:
        notes.append(f"architecture {sizes.name}: neither --architecture nor --model_name_or_path was given")
    if args.local_crop_size is None and args.local_crops_number > 0:
        notes.append(f"local_crop_size {sizes.local_crop_size}: 96 of 224 pixels in proportion, in whole patches")
    if args.reduction_layers is None and sizes.reduction_layers:
        assert sizes.setting is not None
        own = sizes.reduction_layers != sizes.setting.layers
        reason = "the method's own schedule" if own else f"a quarter, half and three quarters of {sizes.depth} blocks"
        notes.append(f"reduction_layers {', '.join(map(str, sizes.reduction_layers))}: {reason}")

    global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size
    steps_per_epoch = None
    if num_images is not None:
        check_batch_size(num_images, global_batch)
        steps_per_epoch = num_images // global_batch
    else:
        check_epochs(args)
    total_steps = _total_steps(args, steps_per_epoch)
    learning_rate = _peak_learning_rate(args, global_batch, notes)
    warmup = _lead_in(args, "warmup_epochs", "warmup_steps", WARMUP_EPOCHS, steps_per_epoch, total_steps, notes)
    freeze = _lead_in(
        args, "freeze_last_layer", "freeze_last_layer_steps", FREEZE_EPOCHS, steps_per_epoch, total_steps, notes
    )
    intervals, interval = _temperature_warmup(args, steps_per_epoch, total_steps)
    out_dim, teacher_temp, momentum = _sized(args, num_images, notes)
    blur = _photometric(args.blur_prob, "blur_prob", (1.0, 0.1, 0.5), sizes, notes)
    solarize = _photometric(args.solarize_prob, "solarize_prob", (0.0, 0.2, 0.0), sizes, notes)
    max_grad_norm = args.max_grad_norm
    if max_grad_norm is None and args.clip_grad is None:
        max_grad_norm = MAX_GRAD_NORM
        notes.append(f"max_grad_norm {MAX_GRAD_NORM:g}: the norm of all gradients together")
    return ResolvedSettings(
        geometry=sizes,
        num_images=num_images,
        world_size=world_size,
        global_batch=global_batch,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        learning_rate=learning_rate,
        warmup_steps=warmup,
        freeze_last_layer_steps=freeze,
        warmup_teacher_temp_intervals=intervals,
        teacher_temp_interval=interval,
        max_grad_norm=max_grad_norm or None,
        clip_grad=args.clip_grad or None,
        out_dim=out_dim,
        teacher_temp=teacher_temp,
        momentum_teacher=momentum,
        blur_prob=blur,
        solarize_prob=solarize,
        notes=tuple(notes),
    )


def describe(resolved: ResolvedSettings) -> list[str]:
    """The lines printed at start: the run's size, its peak learning rate, what is kept, and every choice made."""
    sizes = resolved.geometry
    images = "unknown number of images" if resolved.num_images is None else f"{resolved.num_images:,} images"
    epoch = "" if resolved.steps_per_epoch is None else f", {resolved.steps_per_epoch:,} an epoch"
    processes = "1 process" if resolved.world_size == 1 else f"{resolved.world_size} processes"
    lines = [
        f"{sizes.name}: {sizes.depth} blocks, {sizes.image_size} px in patches of {sizes.patch_size}",
        f"{images}, global batch {resolved.global_batch} on {processes}, {resolved.total_steps:,} steps{epoch}",
        f"peak learning rate {resolved.learning_rate:.4g} after {resolved.warmup_steps:,} steps of warm-up",
        f"global crops {sizes.global_crop_size} px, patch tokens {_arrows(sizes.global_counts)}",
    ]
    if sizes.local_counts:
        lines.append(f"local crops {sizes.local_crop_size} px, patch tokens {_arrows(sizes.local_counts)}")
    return lines + [f"chosen: {note}" for note in resolved.notes]


def _arrows(counts: tuple[int, ...]) -> str:
    return " → ".join(map(str, counts))


def _total_steps(args: DinoArguments, steps_per_epoch: int | None) -> int:
    if args.max_steps > 0:
        return args.max_steps
    if steps_per_epoch is None:
        raise InputError("--max_steps is needed: the number of images in this stream is not known beforehand")
    return max(1, math.ceil(args.num_train_epochs * steps_per_epoch - 1e-9))


def _peak_learning_rate(args: DinoArguments, global_batch: int, notes: list[str]) -> float:
    peak = args.learning_rate
    if peak is None:
        base = BASE_LEARNING_RATE if args.base_learning_rate is None else args.base_learning_rate
        peak = base * global_batch / 256
        notes.append(f"learning_rate {peak:.4g}: base_learning_rate {base:g} x global batch {global_batch} / 256")
    if args.min_learning_rate > peak:
        raise InputError(
            f"--min_learning_rate {args.min_learning_rate:g} is above the peak learning rate {peak:.4g}: lower it"
        )
    return peak


def _lead_in(
    args: DinoArguments,
    epochs_option: str,
    steps_option: str,
    published_epochs: float,
    steps_per_epoch: int | None,
    total_steps: int,
    notes: list[str],
) -> int:
    """Steps of a warm-up or freeze: as given in steps or epochs, else the published epochs, capped in short runs."""
    values = vars(args)
    if values[steps_option] is not None or values[epochs_option] is not None:
        return _given_steps(args, epochs_option, steps_option, steps_per_epoch, total_steps)
    cap = round(RUN_SHARE * total_steps)
    if steps_per_epoch is None:
        # the published share of a run of 100 epochs
        steps = round(published_epochs / 100 * total_steps)
        notes.append(f"{steps_option} {steps}: {published_epochs:g} % of the run, as its epochs are of unknown length")
        return steps
    published = round(published_epochs * steps_per_epoch)
    if published <= cap:
        notes.append(f"{epochs_option} {published_epochs:g}: the published value, {published} steps")
        return published
    notes.append(
        f"{steps_option} {cap}: a fifth of this short run; the published {published_epochs:g} epochs take {published}"
    )
    return cap


def _given_steps(
    args: DinoArguments, epochs_option: str, steps_option: str, steps_per_epoch: int | None, total_steps: int
) -> int:
    values = vars(args)
    steps, option = values[steps_option], steps_option
    if steps is None:
        option = epochs_option
        if steps_per_epoch is None:
            raise InputError(
                f"--{epochs_option} {values[epochs_option]:g}: an epoch of this stream has no known length; "
                f"use --{steps_option}"
            )
        steps = round(values[epochs_option] * steps_per_epoch)
    if steps > total_steps:
        raise InputError(
            f"--{option} {values[option]:g} is {steps} steps, the run has {total_steps}: shorten it or train longer"
        )
    return steps


def _temperature_warmup(args: DinoArguments, steps_per_epoch: int | None, total_steps: int) -> tuple[int, int]:
    """Number of intervals of the teacher temperature's warm-up, and steps in an interval."""
    if args.warmup_teacher_temp_steps is None and args.warmup_teacher_temp_epochs is None:
        return 0, steps_per_epoch or 1
    steps = _given_steps(args, "warmup_teacher_temp_epochs", "warmup_teacher_temp_steps", steps_per_epoch, total_steps)
    if args.warmup_teacher_temp_steps is not None:
        return steps, 1
    assert args.warmup_teacher_temp_epochs is not None and steps_per_epoch is not None
    return args.warmup_teacher_temp_epochs, steps_per_epoch


def _sized(args: DinoArguments, num_images: int | None, notes: list[str]) -> tuple[int, float, float]:
    """out_dim, teacher_temp and momentum_teacher: as given, else published, else scaled to the data set."""
    chosen = LARGE_SET
    if args.auto_scale:
        if num_images is None:
            raise InputError(
                "--auto_scale needs the number of images, which this stream does not tell: give --out_dim, "
                "--teacher_temp and --momentum_teacher"
            )
        chosen = defaults_for_size(num_images)
    reason = f"--auto_scale for {num_images:,} images" if args.auto_scale else "DINO's published value"
    results = []
    for option in ("out_dim", "teacher_temp", "momentum_teacher"):
        value = vars(args)[option]
        if value is None:
            value = vars(chosen)[option]
            notes.append(f"{option} {value:g}: {reason}" if option != "out_dim" else f"{option} {value}: {reason}")
        results.append(value)
    return tuple(results)


def _photometric(
    given: list[float] | None, option: str, published: tuple[float, float, float], sizes: Geometry, notes: list[str]
) -> tuple[float, float, float]:
    if given is not None:
        first, second, local = given
        return first, second, local
    pixels = (sizes.global_crop_size, sizes.global_crop_size, sizes.local_crop_size)
    chosen = tuple(chance if size >= SMALL_CROP else 0.0 for chance, size in zip(published, pixels, strict=True))
    if chosen != published:
        values = " ".join(f"{chance:g}" for chance in chosen)
        notes.append(f"{option} {values}: off for crops below {SMALL_CROP} px")
    first, second, local = chosen
    return first, second, local
