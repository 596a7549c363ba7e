# SPDX-License-Identifier: Apache-2.0
"""The result of a run: a folder that stock transformers loads, with the training's own parts beside it."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BaseImageProcessor, DeiTModel, Dinov2Model, PreTrainedConfig, ViTModel

from ..atomic import PARTIAL, flush, flush_tree, new_folder, write_text
from ..models import (
    SimPruneDeiTConfig,
    SimPruneDeiTModel,
    SimPruneDinov2Config,
    SimPruneDinov2Model,
    SimPruneViTConfig,
    SimPruneViTModel,
)
from ..models.stock import to_stock
from .branch_passes import Backbone
from .dinov2.branch import ensure_mask_token
from .dual_branch import DualBranch


TRAINING = "training"
INITIAL = "initial"
RESULT = "result"  # with `PARTIAL` before it, where the result is made
_FAMILIES: dict[str, tuple[type[PreTrainedConfig], Callable[..., Backbone]]] = {
    SimPruneViTConfig.model_type: (SimPruneViTConfig, SimPruneViTModel),
    SimPruneDeiTConfig.model_type: (SimPruneDeiTConfig, SimPruneDeiTModel),
    SimPruneDinov2Config.model_type: (SimPruneDinov2Config, SimPruneDinov2Model),
}


def save_initial(output_dir: Path, model: DualBranch) -> None:
    """Keep the untrained backbone as a stock model in `training/initial`, to compare the trained one with."""
    with new_folder(output_dir / TRAINING / INITIAL) as folder:
        _stock_teacher(model).save_pretrained(folder)


@contextmanager
def result_folder(output_dir: Path) -> Iterator[Path]:
    """An empty folder in `output_dir` to write the result into; when the block ends its files take their places there.

    Each file of an earlier result is replaced by a whole one, `config.json` last of all: where it lies, the rest does.
    After an error nothing has changed.
    """
    folder = output_dir / f"{PARTIAL}{RESULT}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
        flush_tree(folder)
        names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        for name in sorted(names, key=lambda name: (str(name) == "config.json", name)):
            (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / name, output_dir / name)
        for place in {(output_dir / name).parent for name in names}:
            flush(place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def export_model(output_dir: Path, model: DualBranch, processor: BaseImageProcessor) -> None:
    """Write the teacher's backbone as a stock ViT, DeiT or DINOv2 with its image processor.

    `training/` receives what only further training needs: the student, the teacher's backbone as this package has it
    and the heads.
    """
    _stock_teacher(model).save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    training = output_dir / TRAINING
    model.teacher.backbone.save_pretrained(training / "teacher")
    model.student.backbone.save_pretrained(training / "student")
    for name, branch in (("teacher", model.teacher), ("student", model.student)):
        save_file(_on_cpu(branch.head.state_dict()), training / f"{name}_head.safetensors")
        patch_head = getattr(branch, "patch_head", None)
        if patch_head is not None:
            save_file(_on_cpu(patch_head.state_dict()), training / f"{name}_patch_head.safetensors")


def load_teacher_backbone(output_dir: Path) -> Backbone:
    """The trained teacher's backbone of a finished run, as the training had it."""
    folder = Path(output_dir) / TRAINING / "teacher"
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    config_class, model_class = _FAMILIES[model_type]
    model = model_class(config_class.from_pretrained(folder), add_pooling_layer=False)
    tensors = load_file(folder / "model.safetensors")
    if "embeddings.mask_token" in tensors:
        ensure_mask_token(model)
    model.load_state_dict(tensors)
    return model


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented JSON, the folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")


def _stock_teacher(model: DualBranch) -> ViTModel | DeiTModel | Dinov2Model:
    """Without the mask token of a ViT or DeiT: `AutoModel` builds these without one and would report it."""
    stock = to_stock(model.teacher.backbone)
    if not isinstance(stock, Dinov2Model):
        stock.embeddings.mask_token = None
    return stock


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
