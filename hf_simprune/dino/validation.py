# SPDX-License-Identifier: Apache-2.0
"""What can be said about the options before data and network are loaded. Every complaint is an `InputError`."""

import math
from collections.abc import Callable
from dataclasses import fields

from ..errors import InputError
from .arguments import DinoArguments
from .dinov2.validation import check_objective
from .geometry import geometry, parse_config_overrides


TRACKERS = ("tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")

_Accept = Callable[[float], bool]
_RANGES: tuple[tuple[str, _Accept, tuple[str, ...]], ...] = (
    (
        "a number above 0",
        lambda v: v > 0,
        (
            "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "save_steps",
            "save_total_limit", "logging_steps", "max_train_samples", "max_eval_samples", "image_size", "patch_size",
            "global_crop_size", "local_crop_size", "head_hidden_dim", "head_bottleneck_dim", "teacher_temp",
            "warmup_teacher_temp", "student_temp", "learning_rate", "base_learning_rate", "knn_k", "knn_temperature",
            "knn_bank_samples", "ddp_timeout",
        ),
    ),
    (
        "0 or more",
        lambda v: v >= 0,
        (
            "dataloader_num_workers", "local_crops_number", "min_learning_rate", "weight_decay", "weight_decay_end",
            "max_grad_norm", "clip_grad", "warmup_epochs", "warmup_steps", "warmup_teacher_temp_epochs",
            "warmup_teacher_temp_steps", "freeze_last_layer", "freeze_last_layer_steps", "knn_every",
            "dino_loss_weight", "ibot_loss_weight", "koleo_loss_weight",
        ),
    ),
    (
        "from 0 to 1",
        lambda v: 0 <= v <= 1,
        ("hflip_prob", "color_jitter_prob", "grayscale_prob", "momentum_teacher", "mask_probability"),
    ),
    ("from 0 up to, not including, 1", lambda v: 0 <= v < 1, ("drop_path_rate", "center_momentum")),
    ("above 0 and at most 1", lambda v: 0 < v <= 1, ("keep_rate",)),
    ("-1 (train num_train_epochs) or above 0", lambda v: v == -1 or v > 0, ("max_steps",)),
    ("from 0 to 4294967295", lambda v: 0 <= v < 2**32, ("seed",)),  # NumPy's generator takes no more
    ("2 or more", lambda v: v >= 2, ("out_dim",)),
)  # fmt: skip

_EXCLUSIVE = (
    ("learning_rate", "base_learning_rate"),
    ("architecture", "model_name_or_path"),
    ("config_overrides", "model_name_or_path"),
    ("max_grad_norm", "clip_grad"),
    ("warmup_epochs", "warmup_steps"),
    ("warmup_teacher_temp_epochs", "warmup_teacher_temp_steps"),
    ("freeze_last_layer", "freeze_last_layer_steps"),
)


def validate(args: DinoArguments) -> None:
    """Check all that needs neither data nor weights nor the device: values, combinations, sizes.

    Raises:
        InputError: names the option, its value and what would be accepted.
    """
    from ..hub.card_options import check_card_options

    _check_numbers(args)
    _check_choices(args)
    _check_lists(args)
    for first, second in _EXCLUSIVE:
        if None not in (_value(args, first), _value(args, second)):
            raise InputError(
                f"--{first} {_value(args, first)} and --{second} {_value(args, second)} exclude each other: give one"
            )
    if args.bf16 and args.fp16:
        raise InputError("--bf16 and --fp16 exclude each other: give one")
    if args.overwrite_output_dir and args.resume_from_checkpoint is not None:
        raise InputError("--overwrite_output_dir and --resume_from_checkpoint exclude each other: give one")
    parse_config_overrides(args.config_overrides)
    check_objective(args, geometry(args))
    tracker_names(args.report_to)
    check_card_options(args)
    if args.push_to_hub:
        hub_model_id(args)


def check_precision(args: DinoArguments, accelerate_mixed_precision: str | None, device_type: str) -> str:
    """The precision to train in: "no", "bf16" or "fp16".

    `accelerate_mixed_precision` is what accelerate was configured with: `ACCELERATE_MIXED_PRECISION` in the
    environment of a launched process. "no" is also what a launch that sets no precision passes on, so it contradicts
    nothing.

    Raises:
        InputError: a flag that contradicts accelerate's precision, fp16 on the CPU, or a precision other than these.
    """
    flag = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    configured = (accelerate_mixed_precision or "no").lower()
    if configured not in ("no", "bf16", "fp16"):
        raise InputError(f"accelerate's mixed precision {configured} is not supported: use no, bf16 or fp16")
    if "no" not in (flag, configured) and flag != configured:
        raise InputError(f"--{flag} contradicts accelerate's mixed precision {configured}: drop one of them")
    precision = configured if flag == "no" else flag
    if precision == "fp16" and device_type == "cpu":
        source = "--fp16" if flag == "fp16" else "accelerate's mixed precision fp16"
        raise InputError(f"{source}: there is no fp16 training on the CPU: use --bf16, or neither for fp32")
    return precision


def check_batch_size(num_examples: int, global_batch: int) -> None:
    """Raise InputError when one step needs more images than there are."""
    if global_batch > num_examples:
        raise InputError(
            f"the global batch of {global_batch} images (--per_device_train_batch_size x "
            f"--gradient_accumulation_steps x processes) is larger than the data set, {num_examples} images: reduce it"
        )


def tracker_names(report_to: str) -> list[str]:
    """The trackers in `--report_to`, for `Accelerator(log_with=…)`; "none" gives an empty list.

    Raises:
        InputError: a tracker that is unknown or not installed.
    """
    names = [name.strip() for name in report_to.split(",")]
    if names == ["none"]:
        return []
    for name in names:
        if name not in (*TRACKERS, "all"):
            raise InputError(f"--report_to {report_to}: {name!r} is unknown: use none, all or {', '.join(TRACKERS)}")
    from accelerate.tracking import get_available_trackers

    available = [tracker.value for tracker in get_available_trackers()]
    if "all" in names:
        return available
    for name in names:
        if name not in available:
            raise InputError(f"--report_to {report_to}: {name} is not installed; it is an extra: pip install {name}")
    return names


def hub_model_id(args: DinoArguments) -> str:
    """The repository to push to: `--hub_model_id`, or the name of the output folder, as `TrainingArguments` has it.

    Raises:
        InputError: the name cannot be a repository's.
    """
    from ..hub.publish import repository_name

    return repository_name(args.hub_model_id, args.output_dir)


def _check_numbers(args: DinoArguments) -> None:
    for option in fields(args):
        value = _value(args, option.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{option.name} {value}: must be a finite number")
    for words, accept, options in _RANGES:
        for name in options:
            value = _value(args, name)
            if value is not None and not accept(value):
                raise InputError(f"--{name} {value}: must be {words}")


def _check_choices(args: DinoArguments) -> None:
    from ..reduction import CURRICULA, MATCHINGS, REDUCTIONS

    choices = {
        "token_reduction": REDUCTIONS,
        "curriculum": CURRICULA,
        "matching": MATCHINGS,
        "on_bad_image": ("skip", "error"),
        "hub_strategy": ("end", "every_save"),
    }
    for option, known in choices.items():
        if _value(args, option) not in known:
            raise InputError(f"--{option} {_value(args, option)} is unknown: choose one of {', '.join(known)}")
    attention = args.attn_implementation
    if attention is not None and attention not in ATTENTIONS:
        raise InputError(f"--attn_implementation {attention} is unknown: choose one of {', '.join(ATTENTIONS)}")


def _check_lists(args: DinoArguments) -> None:
    for option in ("global_crops_scale", "local_crops_scale"):
        scale = _value(args, option)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise InputError(f"--{option} {_spaced(scale)}: give two shares of the area, 0 < smallest <= largest <= 1")
    for option in ("blur_prob", "solarize_prob"):
        chances = _value(args, option)
        if chances is not None and (len(chances) != 3 or not all(0 <= chance <= 1 for chance in chances)):
            raise InputError(
                f"--{option} {_spaced(chances)}: give three probabilities, for the two global and for the local crops"
            )
    jitter = args.color_jitter
    if len(jitter) != 4 or not all(0 <= strength < math.inf for strength in jitter) or jitter[3] > 0.5:
        raise InputError(
            f"--color_jitter {_spaced(jitter)}: give brightness, contrast, saturation, hue, none negative, hue <= 0.5"
        )
    if args.reduction_layers is not None and not args.reduction_layers:
        raise InputError("--reduction_layers is empty: name blocks, or use --token_reduction none for dense training")


def _spaced(values: list[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _value(args: DinoArguments, option: str):
    return vars(args)[option]
