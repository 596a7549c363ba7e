# SPDX-License-Identifier: Apache-2.0
"""From options to networks: student and teacher, the image processor, the augmentation."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME

from ..errors import InputError
from ..evaluation.features import build_image_processor
from ..models import (
    SimPruneDeiTConfig,
    SimPruneDeiTModel,
    SimPruneDinov2Config,
    SimPruneDinov2Model,
    SimPruneViTModel,
)
from ..models.architectures import build_backbone
from ..models.untrusted import reading
from .arguments import DinoArguments
from .augmentation import AugmentationConfig
from .branch_passes import Backbone
from .dinov2.branch import Dinov2Branch, Dinov2DualBranch, ensure_mask_token
from .dinov2.objective import Dinov2Objective
from .dinov2.validation import block_masking
from .dual_branch import Branch, DualBranch
from .geometry import parse_config_overrides
from .head import DinoHead
from .objective import DinoObjective, Objective
from .reduction_choice import chosen_reducer
from .resolve import ResolvedSettings
from .schedules import DinoSchedules


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_MODELS: dict[str, type[SimPruneViTModel] | type[SimPruneDeiTModel] | type[SimPruneDinov2Model]] = {
    "deit": SimPruneDeiTModel,
    "dinov2": SimPruneDinov2Model,
    SimPruneDeiTConfig.model_type: SimPruneDeiTModel,
    SimPruneDinov2Config.model_type: SimPruneDinov2Model,
}


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each channel, in 0..1; `source` says in words where they come from."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source: str


IMAGENET = Normalisation(IMAGENET_MEAN, IMAGENET_STD, "ImageNet's mean and standard deviation")


def normalisation(args: DinoArguments) -> Normalisation:
    """Of the checkpoint's own image processor where there is one, ImageNet's otherwise (as DINO has it)."""
    name = args.model_name_or_path
    if name is None:
        return IMAGENET
    where = f"--model_name_or_path {name}: its image processor cannot be used"
    with reading(where):
        try:
            processor = AutoImageProcessor.from_pretrained(
                name, revision=args.model_revision, token=args.token, backend="pil", trust_remote_code=False
            )
        except OSError:
            if (Path(name) / IMAGE_PROCESSOR_NAME).exists():  # it is there and no JSON
                raise
            return replace(IMAGENET, source=f"{IMAGENET.source}, as {name} has no image processor")
        mean, std = tuple(map(float, processor.image_mean)), tuple(map(float, processor.image_std))
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise InputError(
            f"{where}: image_mean {mean} and image_std {std} must be three numbers each, the latter above 0"
        )
    return Normalisation((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), f"that of {name}")


def image_processor(settings: ResolvedSettings, norm: Normalisation) -> BaseImageProcessor:
    """The processor saved with the model: resizes to the size the position embeddings are laid out for."""
    return build_image_processor(settings.image_size, norm.mean, norm.std)


def augmentation(args: DinoArguments, settings: ResolvedSettings, norm: Normalisation) -> AugmentationConfig:
    least, most = args.global_crops_scale
    local_least, local_most = args.local_crops_scale
    brightness, contrast, saturation, hue = args.color_jitter
    return AugmentationConfig(
        global_crop_size=settings.global_crop_size,
        local_crop_size=settings.local_crop_size,
        global_crops_scale=(least, most),
        local_crops_scale=(local_least, local_most),
        local_crops_number=args.local_crops_number,
        hflip_prob=args.hflip_prob,
        color_jitter=(brightness, contrast, saturation, hue),
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        blur_prob=settings.blur_prob,
        solarize_prob=settings.solarize_prob,
        image_mean=norm.mean,
        image_std=norm.std,
        masking=block_masking(args, settings.geometry),
    )


def attention_implementation(args: DinoArguments, device_type: str, precision: str) -> str:
    """As asked for, else [`default_attention`]."""
    return args.attn_implementation or default_attention(device_type, precision == "bf16")


def default_attention(device_type: str, bf16: bool) -> str:
    """sdpa, except for bf16 on the CPU, where plain softmax attention is faster."""
    return "eager" if device_type == "cpu" and bf16 else "sdpa"


def build_dual_branch(args: DinoArguments, settings: ResolvedSettings, attention: str = "sdpa") -> DualBranch:
    """Student and teacher with equal weights, a function of the seed (and of the checkpoint, if one is given)."""
    set_seed(args.seed)
    branches = []
    for drop_path_rate in (args.drop_path_rate, 0.0):
        backbone = _backbone(args, settings, drop_path_rate)
        try:
            backbone.set_attn_implementation(attention)
        except (ImportError, ValueError) as error:
            raise InputError(f"--attn_implementation {attention}: {' '.join(str(error).split())}") from None
        branches.append(_branch(args, settings, backbone))
    student, teacher = branches
    if args.gradient_checkpointing:
        student.backbone.activation_checkpointing_enable()
    if args.torch_compile:
        for branch in branches:
            branch.backbone.compile_blocks()
    setting = settings.geometry.setting
    reducer = None if setting is None else chosen_reducer(args, setting)
    if args.objective == "dinov2":
        assert isinstance(student, Dinov2Branch) and isinstance(teacher, Dinov2Branch)
        return Dinov2DualBranch(student, teacher, reducer, args.masked_policy)
    return DualBranch(student, teacher, reducer)


def build_objective(args: DinoArguments) -> Objective:
    """The loss, with its weights."""
    if args.objective == "dino":
        return DinoObjective(args.student_temp, args.center_momentum)
    return Dinov2Objective(
        args.student_temp,
        args.center_momentum,
        args.centering,
        args.dino_loss_weight,
        args.ibot_loss_weight,
        args.koleo_loss_weight,
    )


def build_schedules(args: DinoArguments, settings: ResolvedSettings) -> DinoSchedules:
    return DinoSchedules(
        total_steps=settings.total_steps,
        learning_rate=settings.learning_rate,
        min_learning_rate=args.min_learning_rate,
        warmup_steps=settings.warmup_steps,
        weight_decay=args.weight_decay,
        weight_decay_end=args.weight_decay_end,
        momentum_teacher=settings.momentum_teacher,
        teacher_temp=settings.teacher_temp,
        warmup_teacher_temp=args.warmup_teacher_temp,
        warmup_teacher_temp_intervals=settings.warmup_teacher_temp_intervals,
        teacher_temp_interval=settings.teacher_temp_interval,
        freeze_last_layer_steps=settings.freeze_last_layer_steps,
        curriculum=args.curriculum,
    )


def _branch(args: DinoArguments, settings: ResolvedSettings, backbone: Backbone) -> Branch:
    """A backbone with new heads, and a mask token that learns where views are masked only."""

    def head() -> DinoHead:
        return DinoHead(
            backbone.config.hidden_size,
            settings.out_dim,
            args.head_hidden_dim,
            args.head_bottleneck_dim,
            args.norm_last_layer,
        )

    if args.objective == "dinov2":
        ensure_mask_token(backbone)
        return Dinov2Branch(backbone, head(), None if args.shared_heads else head())
    if backbone.embeddings.mask_token is not None:
        # data-parallel wrappers want a gradient for everything that could have one
        backbone.embeddings.mask_token.requires_grad_(False)
    return Branch(backbone, head())


def _backbone(args: DinoArguments, settings: ResolvedSettings, drop_path_rate: float) -> Backbone:
    if args.model_name_or_path is None:
        return build_backbone(
            settings.geometry.name,
            settings.image_size,
            settings.patch_size,
            drop_path_rate,
            **parse_config_overrides(args.config_overrides),
        )
    hub: dict[str, Any] = {"revision": args.model_revision, "token": args.token}
    model_class = _MODELS.get(_model_type(args, hub), SimPruneViTModel)
    with reading(f"--model_name_or_path {args.model_name_or_path}"):
        model = model_class.from_pretrained(
            args.model_name_or_path,
            add_pooling_layer=False,
            drop_path_rate=drop_path_rate,
            dtype=torch.float32,
            **{key: value for key, value in hub.items() if value is not None},
        )
    if model.config.image_size != settings.image_size:
        raise InputError(
            f"--image_size {settings.image_size}: {args.model_name_or_path} was made for {model.config.image_size} "
            "pixels; leave the option out and choose crops with --global_crop_size"
        )
    return model


def _model_type(args: DinoArguments, hub: dict[str, str | None]) -> str:
    assert args.model_name_or_path is not None
    return AutoConfig.from_pretrained(args.model_name_or_path, **hub).model_type
