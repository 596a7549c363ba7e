# SPDX-License-Identifier: Apache-2.0
"""Run facebookresearch/dino's own `train_one_epoch`, one step at a time, from a checkout that is not edited.

`main_dino.train_one_epoch`, `DINOLoss`, `MultiCropWrapper`, `DINOHead`, the ViT, clipping and parameter groups are
the original's. Only calls that need a GPU, a network, a data set or several processes are replaced from outside.
"""

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import torch
from _engine import VALUES, Setting
from torch import Tensor, nn


def import_original(checkout: str, device: torch.device, bf16: bool) -> tuple[ModuleType, ModuleType, ModuleType]:
    """(main_dino, utils, vision_transformer), with all replacements in place. None changes the mathematics."""
    torch.hub.list = lambda *_, **__: []  # main_dino's argument parser lists a repository over the network
    if device.type == "cpu":
        Tensor.cuda = lambda self, *_, **__: self  # crops are moved to the GPU
        nn.Module.cuda = lambda self, *_, **__: self
        torch.cuda.synchronize = lambda *_, **__: None
    if bf16:
        # the original switches autocast off unless it has an fp16 scaler
        torch.cuda.amp.autocast = lambda *_, **__: torch.autocast(device.type, torch.bfloat16)
    if not torch.distributed.is_initialized():  # the centre is all-reduced also by a single process
        with tempfile.NamedTemporaryFile(delete=False) as file:
            backend = "nccl" if device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, init_method=f"file://{file.name}", world_size=1, rank=0)
    if not os.path.isfile(os.path.join(checkout, "main_dino.py")):
        raise SystemExit(f"--dino {checkout}: no main_dino.py there; give a checkout of facebookresearch/dino")
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    import main_dino
    import utils
    import vision_transformer

    utils.is_dist_avail_and_initialized = lambda: False  # its meters are gathered on a GPU
    return main_dino, utils, vision_transformer


class OneBatch:
    """A data loader of one batch."""

    def __init__(self, crops: list[Tensor]) -> None:
        self.crops = crops

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[tuple[list[Tensor], None]]:
        yield self.crops, None


def build_original_step(
    checkout: str, setting: Setting, crops: list[Tensor], clip_grad: float
) -> Callable[[], object]:
    """One call is one whole step of the original: an epoch of one batch, after the freeze of the last layer."""
    main_dino, utils, vits = import_original(checkout, setting.device, setting.bf16)
    torch.manual_seed(setting.seed)
    make = vars(vits)[setting.architecture]
    student, teacher = (
        utils.MultiCropWrapper(backbone, vits.DINOHead(backbone.embed_dim, setting.out_dim, norm_last_layer=True))
        for backbone in (make(patch_size=16, drop_path_rate=rate) for rate in (setting.drop_path_rate, 0.0))
    )
    # as the original does it: wrapped for data parallelism even when there is one process
    student = nn.parallel.DistributedDataParallel(student.to(setting.device))
    teacher = teacher.to(setting.device).requires_grad_(False)
    teacher.load_state_dict(student.module.state_dict())
    loss = main_dino.DINOLoss(setting.out_dim, len(crops), VALUES.teacher_temp, VALUES.teacher_temp, 0, 2)
    loss = loss.to(setting.device)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    # schedules are indexed by the iteration, which is 1 in epoch 1 of one batch each
    learning_rates, decays, momenta = (
        [value] * 2 for value in (VALUES.learning_rate, VALUES.weight_decay, VALUES.momentum_teacher)
    )
    options = SimpleNamespace(epochs=2, clip_grad=clip_grad, freeze_last_layer=1)
    loader = OneBatch(crops)

    def step() -> object:
        with contextlib.redirect_stdout(io.StringIO()):
            return main_dino.train_one_epoch(
                student, teacher, teacher, loss, loader, optimizer, learning_rates, decays, momenta, 1, None, options
            )

    return step
