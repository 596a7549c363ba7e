"""Short trainings on real images, crops and all, in double precision, for one process or several."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from hf_simprune.dino.augmentation import AugmentationConfig
from hf_simprune.dino.data import MultiCropDataset
from hf_simprune.dino.dinov2.masking import BlockMasking
from hf_simprune.dino.dinov2.objective import Dinov2Objective
from hf_simprune.dino.engine import DinoEngine, Views
from hf_simprune.dino.objective import DinoObjective
from hf_simprune.dino.sharding import Sharding
from hf_simprune.dino.trainer import DinoTrainer, LoopSettings
from hf_simprune.dino.views import LoaderSource
from hf_simprune.reduction import METHODS

from ..tiny_run import write_images
from .conftest import tiny_dual, tiny_schedules
from .dinov2.tiny_dinov2 import tiny_dinov2


NUM_IMAGES = 37  # an epoch is four steps of 8 and leaves 5 images over
GLOBAL_BATCH = 8
# of 4 x 4 patches something goes at every stage
KEEP, LAYERS = 0.5, (1, 2)
CASES = [("dino", name) for name in ("none", *METHODS)]
CASES += [("dinov2", name) for name in ("none", *METHODS) if name == "none" or not METHODS[name].merges]


class DoubleSource(LoaderSource):
    """Crops in double precision: no rounding then makes a token leave that stays elsewhere."""

    def views(self, batch) -> Views:
        views = super().views(batch)
        return views._replace(global_crops=views.global_crops.double(), local_crops=views.local_crops.double())


def image_file(folder: Path) -> str:
    return write_images(folder / "images.parquet", NUM_IMAGES)


def training(
    folder: Path, images: str, objective: str, reduction: str, total: int = 4, sharding: Sharding | None = None,
    weights: int = 0, checkpointing: bool = False, clip_grad: float | None = None, save_steps: int = 2,
) -> DinoTrainer:  # fmt: skip
    """A trainer for this process; drop path is 0, because torch's generator, which draws it, is seeded by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=True)
    keep = 1.0 if reduction == "none" else KEEP
    build, chosen, masking = tiny_dual, DinoObjective(), None
    if objective == "dinov2":
        build, chosen, masking = tiny_dinov2, Dinov2Objective(), BlockMasking((4, 4), 0.2, 0.5, 0.7)
    dual = build(reduction, keep, layers=LAYERS, seed=weights)
    if checkpointing:
        dual.student.backbone.activation_checkpointing_enable()
    clip = {"clip_grad": clip_grad} if clip_grad else {}
    engine = DinoEngine(dual, accelerator, chosen, **clip, sharding=sharding)
    config = AugmentationConfig(global_crop_size=16, local_crop_size=8, local_crops_number=2, masking=masking)
    rows = MultiCropDataset(Dataset.from_parquet(images, cache_dir=str(folder / "cache")), "image", config, seed=5)
    world, rank = accelerator.num_processes, accelerator.process_index
    source = DoubleSource(
        rows, NUM_IMAGES, config, accelerator.device, GLOBAL_BATCH // world, world_size=world, rank=rank, seed=5
    )
    settings = LoopSettings(
        output_dir=folder, images_per_step=GLOBAL_BATCH, steps_per_epoch=4, logging_steps=1, save_steps=save_steps,
        save_total_limit=None, disable_tqdm=True,
    )  # fmt: skip
    # nothing is frozen and nothing warms up, so that every parameter moves
    schedules = tiny_schedules(total, warmup_steps=0, freeze_last_layer_steps=1)
    return DinoTrainer(engine, schedules, source, settings)


def logged(folder: Path) -> Tensor:
    """(steps, 3): loss, teacher entropy, gradient norm."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[r["loss"], r["teacher_entropy"], r["gradient_norm"]] for r in records if "loss" in r])
