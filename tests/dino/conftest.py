"""A tiny double-precision DINO, built the way the trainer builds it, and small data sets."""

import datasets
import pytest
import torch
from accelerate import Accelerator

from hf_simprune.dino.dual_branch import Branch, DualBranch
from hf_simprune.dino.engine import DinoEngine, Views
from hf_simprune.dino.head import DinoHead
from hf_simprune.dino.schedules import DinoSchedules
from hf_simprune.models.architectures import build_backbone
from hf_simprune.reduction import ReductionSetting, build_reducer

from .image_files import encode, pixels, write_parquet


OUT_DIM = 24
TINY = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}


def tiny_branch(architecture="vit_micro", drop_path_rate=0.0, **changes) -> Branch:
    backbone = build_backbone(architecture, image_size=16, patch_size=4, drop_path_rate=drop_path_rate, **TINY)
    return Branch(backbone, DinoHead(24, changes.get("out_dim", OUT_DIM), hidden_dim=32, bottleneck_dim=12))


def tiny_dual(
    reduction="none", keep_rate=1.0, layers=(1, 2, 3), dtype=torch.float64, seed=0, architecture="vit_micro", **changes
) -> DualBranch:
    """`options` are those of the reduction; crops come as in `tiny_views`."""
    torch.manual_seed(seed)
    student, teacher = (
        tiny_branch(architecture, drop_path_rate=changes.get("drop_path_rate", 0.0)),
        tiny_branch(architecture),
    )
    prefix = 2 if architecture.startswith("deit") else 1
    setting = ReductionSetting(tuple(layers), 4, 24, 2, prefix, grids=((4, 4), (2, 2)))
    reducer = build_reducer(reduction, keep_rate, setting, changes.get("options"))
    return DualBranch(student, teacher, reducer).to(dtype)


def tiny_engine(dual: DualBranch | None = None, **changes) -> DinoEngine:
    return DinoEngine(dual if dual is not None else tiny_dual(), Accelerator(cpu=True), **changes)


def tiny_views(step=0, batch=3, local=2, dtype=torch.float64, size=16, local_size=8) -> Views:
    generator = torch.Generator().manual_seed(1000 + step)
    crops = torch.randn(2 * batch, 3, size, size, generator=generator, dtype=dtype)
    small = torch.randn(local * batch, 3, local_size, local_size, generator=generator, dtype=dtype) if local else None
    return Views(crops, small)


def tiny_schedules(total=20, **changes) -> DinoSchedules:
    values = {
        "total_steps": total, "learning_rate": 2e-3, "min_learning_rate": 1e-6, "warmup_steps": 5,
        "weight_decay": 0.04, "weight_decay_end": 0.4, "momentum_teacher": 0.9, "teacher_temp": 0.07,
        "warmup_teacher_temp": 0.04, "warmup_teacher_temp_intervals": 3, "teacher_temp_interval": 5,
        "freeze_last_layer_steps": 4, "curriculum": "linear",
    }  # fmt: skip
    return DinoSchedules(**(values | changes))


class FixedViews:
    """A view source that needs no data: step t gets `micro` micro-batches seeded by t."""

    def __init__(self, micro=1, **views):
        self.micro, self.options = micro, views

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}

    def batches(self, start):
        step = start
        while True:
            yield [tiny_views(step * self.micro + i, **self.options) for i in range(self.micro)]
            step += 1

    def views(self, batch):
        return batch


@pytest.fixture
def images() -> list[bytes]:
    return [encode(pixels(seed, 40 + seed, 30)) for seed in range(12)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # otherwise each epoch of several parquet shards ends with five seconds of sleep
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def parquet(tmp_path, images) -> str:
    return write_parquet(tmp_path / "some_images.parquet", images)


@pytest.fixture
def broken(tmp_path, images) -> str:
    images[3] = images[3][:200]  # truncated
    images[4] = b"no image"
    images[11] = b""
    return write_parquet(tmp_path / "broken.parquet", images)


@pytest.fixture
def shards(tmp_path, images) -> str:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(4):
        write_parquet(folder / f"train-{number}.parquet", images[3 * number : 3 * number + 3])
    return str(folder)
