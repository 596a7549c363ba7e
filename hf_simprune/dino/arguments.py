# SPDX-License-Identifier: Apache-2.0
"""All options of a DINO run in one dataclass.

Names follow `transformers.TrainingArguments` where it has them and facebookresearch/dino for what is DINO's own.
`None` means "chosen at start": the published value, or one adapted to the data; the choice is printed (see `resolve`).
"""

from dataclasses import dataclass

from ..options.common import (
    BenchmarkArguments,
    CardArguments,
    CheckpointArguments,
    DatasetArguments,
    HubArguments,
    OutputArguments,
)
from ..options.fields import option, values


@dataclass(kw_only=True)
class SavingArguments:
    """Checkpoints, and whether the run goes on with an earlier one."""

    _argument_group_name = "checkpoints"

    resume_from_checkpoint: str | None = option(None, "A checkpoint-<step> folder, or `latest`.")
    allow_schedule_change: bool = option(
        False,
        "Resume although options differ that make the run another one, such as its length or number of processes; a "
        "stream read by other processes or workers goes on at its next epoch.",
    )
    save_steps: int = option(500, "Optimiser steps between two checkpoints.")
    save_total_limit: int | None = option(2, "Checkpoints kept; the oldest go first. None keeps all.")


@dataclass(kw_only=True)
class TrainingDataArguments:
    """How the images are read."""

    _argument_group_name = "training data"

    train_split: str = option("train", "Split to train on.")
    streaming: bool = option(False, "Read the data set as a stream, without holding or downloading all of it.")
    max_train_samples: int | None = option(None, "Use only so many training images.")
    on_bad_image: str = option("skip", "`skip` and count images that cannot be read, or stop with an `error`.")
    dataloader_num_workers: int = option(0, "Processes that decode and crop; 0 does it in the training process.")


@dataclass(kw_only=True)
class ModelArguments:
    """What is trained: a new network, or the checkpoint that student and teacher start from, a stock ViT or DeiT."""

    _argument_group_name = "model"

    architecture: str | None = option(
        None,
        "A new network: vit_micro, vit_tiny, vit_small, vit_base, deit_tiny, deit_small, deit_base, dinov2_tiny, "
        "dinov2_small, dinov2_base (vit_small, dinov2_small for --objective dinov2); excludes --model_name_or_path, "
        "a stock ViT, DeiT or DINOv2.",
    )
    config_overrides: str | None = option(
        None, "Changes to --architecture, as in num_hidden_layers=4,hidden_size=128."
    )
    image_size: int | None = option(None, "Pixels a side the network is made for (224, or the checkpoint's).")
    patch_size: int | None = option(None, "Pixels a side of a patch (the architecture's or the checkpoint's).")
    drop_path_rate: float = option(0.1, "Stochastic depth of the student.")
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2 ….")
    torch_compile: bool = option(False, "Compile every block.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")


@dataclass(kw_only=True)
class ReductionArguments:
    """Which tokens stay."""

    _argument_group_name = "token reduction"

    token_reduction: str = option(
        "simprune",
        "simprune, simprune_dynamic, evit, tome, mctf, expedit, patch_slimming (adapted to self-supervised training), "
        "self_slimmed, random or none (dense).",
    )
    keep_rate: float = option(0.8, "Share of the patch tokens each stage keeps, in (0, 1].")
    reduction_layers: list[int] | None = option(
        None, "0-based blocks in which tokens leave or merge (a quarter, half and three quarters deep)."
    )
    curriculum: str = option(
        "linear", "linear: from similar to dissimilar tokens kept; easy, hard: one end only; step: in stages."
    )
    matching: str = option(
        "one_way", "one_way: student to teacher; symmetric: both ways. For simprune's two variants."
    )
    reduction_options: str | None = option(
        None, "Further options of the method, as in fuse=false, or schedule=every_layer,r=8."
    )


@dataclass(kw_only=True)
class DistillationArguments:
    """Heads, temperatures and teacher."""

    _argument_group_name = "self-distillation"

    out_dim: int | None = option(None, "Prototypes (65536).")
    norm_last_layer: bool = option(True, "Keep the last layer's weights at unit length.")
    head_hidden_dim: int = option(2048, "Width of the head's hidden layers.")
    head_bottleneck_dim: int = option(256, "Width before the prototypes.")
    momentum_teacher: float | None = option(None, "Start of the teacher's momentum; a cosine takes it to 1 (0.996).")
    teacher_temp: float | None = option(None, "Teacher temperature after its warm-up (0.04).")
    warmup_teacher_temp: float = option(0.04, "Teacher temperature at the start of its warm-up.")
    warmup_teacher_temp_epochs: int | None = option(None, "Epochs of that warm-up (0).")
    warmup_teacher_temp_steps: int | None = option(None, "The same in optimiser steps.")
    student_temp: float = option(0.1, "Student temperature.")
    center_momentum: float = option(0.9, "Momentum of the centre.")
    freeze_last_layer: float | None = option(None, "Epochs during which the last layer does not move (1).")
    freeze_last_layer_steps: int | None = option(None, "The same in optimiser steps.")
    auto_scale: bool = option(
        False, "Adapt out_dim, teacher_temp and momentum_teacher to the number of images; given values win."
    )


@dataclass(kw_only=True)
class ObjectiveArguments:
    """What is minimised."""

    _argument_group_name = "objective"

    objective: str = option("dino", "dino, or dinov2: with iBOT's loss on masked patches and KoLeo.")


@dataclass(kw_only=True)
class Dinov2Arguments:
    """What --objective dinov2 adds."""

    _argument_group_name = "DINOv2"

    dino_loss_weight: float = option(1.0, "Weight of DINO's loss on CLS.")
    ibot_loss_weight: float = option(1.0, "Weight of iBOT's loss on masked patches.")
    koleo_loss_weight: float = option(0.1, "Weight of KoLeo, which spreads the CLS features of a batch.")
    centering: str = option("sinkhorn_knopp", "Of the teacher's logits: sinkhorn_knopp, or centering by an average.")
    shared_heads: bool = option(False, "One head for CLS and patches instead of two.")
    mask_probability: float = option(0.5, "Probability that a global view of the student is masked.")
    mask_ratio_min: float = option(0.1, "Smallest share of the patches of a masked view, in [0, 1).")
    mask_ratio_max: float = option(0.5, "Largest share.")
    masked_policy: str = option(
        "pair", "SimPrune and masked tokens: pair prunes them with the teacher's in their place; keep never does."
    )


@dataclass(kw_only=True)
class AugmentationArguments:
    """Multi-crop and its photometric part, as DINO published them."""

    _argument_group_name = "crops and augmentation"

    global_crop_size: int | None = option(None, "Pixels a side of the two global crops (image_size).")
    local_crop_size: int | None = option(
        None, "Pixels a side of the local crops (96 at 224, in proportion elsewhere)."
    )
    local_crops_number: int = option(8, "Local crops an image; 0 for none.")
    global_crops_scale: list[float] = values((0.4, 1.0), "Smallest and largest share of the area, global crops.")
    local_crops_scale: list[float] = values((0.05, 0.4), "The same for local crops.")
    hflip_prob: float = option(0.5, "Probability of a horizontal flip.")
    color_jitter: list[float] = values((0.4, 0.4, 0.2, 0.1), "Strength for brightness, contrast, saturation, hue.")
    color_jitter_prob: float = option(0.8, "Probability of the colour jitter.")
    grayscale_prob: float = option(0.2, "Probability of losing all colour.")
    blur_prob: list[float] | None = option(
        None, "Probability of a blur for first global, second global and local crops (1.0 0.1 0.5; 0 below 64 px)."
    )
    solarize_prob: list[float] | None = option(
        None, "Probability of solarising, in the same order (0.0 0.2 0.0; 0 below 64 px)."
    )


@dataclass(kw_only=True)
class OptimizationArguments:
    """Batch, length, rates and precision."""

    _argument_group_name = "optimisation"

    per_device_train_batch_size: int = option(64, "Images a process and micro-batch.")
    gradient_accumulation_steps: int = option(1, "Micro-batches a step.")
    num_train_epochs: float = option(100.0, "Passes over the data.")
    max_steps: int = option(-1, "Optimiser steps; above 0 it replaces num_train_epochs.")
    learning_rate: float | None = option(None, "Peak learning rate; excludes base_learning_rate.")
    base_learning_rate: float | None = option(None, "Peak learning rate at a global batch of 256 (5e-4).")
    min_learning_rate: float = option(1e-6, "Learning rate at the end of the cosine.")
    warmup_epochs: float | None = option(None, "Epochs of learning-rate warm-up (10, at most a fifth of the run).")
    warmup_steps: int | None = option(None, "The same in optimiser steps.")
    weight_decay: float = option(0.04, "Weight decay at the start of its cosine.")
    weight_decay_end: float = option(0.4, "Weight decay at its end.")
    max_grad_norm: float | None = option(None, "Clip the norm of all gradients together (3.0); 0 does not clip.")
    clip_grad: float | None = option(
        None, "DINO's clipping, each parameter by itself; excludes max_grad_norm; 0 does not clip."
    )
    seed: int = option(42, "Fixes initialisation, order and every crop.")
    bf16: bool = option(False, "bfloat16 autocast.")
    fp16: bool = option(False, "float16 autocast with loss scaling; not on the CPU.")
    ddp_timeout: int = option(1800, "Seconds that a process waits for the others before the run ends with an error.")


@dataclass(kw_only=True)
class LoggingArguments:
    """What is reported, and the k-NN."""

    _argument_group_name = "logging and k-NN"

    logging_steps: int = option(10, "Optimiser steps between two lines of metrics.jsonl.")
    report_to: str = option("none", "Trackers, separated by commas: tensorboard, wandb, trackio …, all or none.")
    run_name: str | None = option(None, "Name of the run for the trackers.")
    disable_tqdm: bool = option(False, "No progress bar.")
    knn_every: int = option(0, "Optimiser steps between two k-NN evaluations; 0: before and after training only.")
    knn_k: int = option(20, "Neighbours.")
    knn_temperature: float = option(0.07, "Temperature of the neighbours' weights.")
    knn_bank_samples: int = option(10000, "Labelled images the neighbours are taken from, at most.")


@dataclass(kw_only=True)
class PublishingArguments:
    """When the result is published."""

    _argument_group_name = "publishing"

    hub_strategy: str = option("end", "Upload at the `end`, or at `every_save`.")


ARGUMENT_GROUPS = (
    OutputArguments,
    SavingArguments,
    DatasetArguments,
    TrainingDataArguments,
    CheckpointArguments,
    ModelArguments,
    ReductionArguments,
    ObjectiveArguments,
    DistillationArguments,
    Dinov2Arguments,
    AugmentationArguments,
    OptimizationArguments,
    LoggingArguments,
    CardArguments,
    BenchmarkArguments,
    HubArguments,
    PublishingArguments,
)


@dataclass(kw_only=True)
class DinoArguments(
    OutputArguments,
    SavingArguments,
    DatasetArguments,
    TrainingDataArguments,
    CheckpointArguments,
    ModelArguments,
    ReductionArguments,
    ObjectiveArguments,
    DistillationArguments,
    Dinov2Arguments,
    AugmentationArguments,
    OptimizationArguments,
    LoggingArguments,
    CardArguments,
    BenchmarkArguments,
    HubArguments,
    PublishingArguments,
):
    """Every option of `recipes/train_dino.py`; its `--help` describes them by group."""

    _argument_group_name = "DINO"
