"""A tiny double-precision DINOv2, built the way the trainer builds it, and masked views."""

import torch
from accelerate import Accelerator

from hf_simprune.dino.augmentation import MASKS_DOMAIN, philox
from hf_simprune.dino.dinov2.branch import Dinov2Branch, Dinov2DualBranch, ensure_mask_token
from hf_simprune.dino.dinov2.masking import BlockMasking, draw_masks
from hf_simprune.dino.dinov2.objective import Dinov2Objective
from hf_simprune.dino.engine import DinoEngine, Views
from hf_simprune.dino.head import DinoHead
from hf_simprune.models.architectures import build_backbone
from hf_simprune.reduction import ReductionSetting, build_reducer

from ..conftest import OUT_DIM, TINY, FixedViews, tiny_views


MASKING = BlockMasking((4, 4), 0.2, 0.5, 0.7)


def tiny_dinov2(
    reduction="none", keep_rate=1.0, layers=(1, 2, 3), dtype=torch.float64, seed=0, architecture="dinov2_tiny",
    drop_path_rate=0.0, shared_heads=False, masked_policy="pair", options=None,
) -> Dinov2DualBranch:  # fmt: skip
    torch.manual_seed(seed)
    scale = {"layerscale_value": 0.5} if architecture.startswith("dinov2") else {}

    def branch(rate):
        backbone = build_backbone(architecture, 16, 4, rate, **TINY, **scale)
        ensure_mask_token(backbone)
        torch.nn.init.normal_(backbone.embeddings.mask_token)
        heads = [DinoHead(24, OUT_DIM, hidden_dim=32, bottleneck_dim=12) for _ in range(2 - shared_heads)]
        return Dinov2Branch(backbone, *heads)

    prefix = 2 if architecture.startswith("deit") else 1
    setting = ReductionSetting(tuple(layers), 4, 24, 2, prefix, grids=((4, 4), (2, 2)))
    reducer = build_reducer(reduction, keep_rate, setting, options)
    return Dinov2DualBranch(branch(drop_path_rate), branch(0.0), reducer, masked_policy).to(dtype)


def tiny_dinov2_engine(dual=None, objective=None, **changes) -> DinoEngine:
    dual = dual if dual is not None else tiny_dinov2()
    return DinoEngine(dual, Accelerator(cpu=True), objective or Dinov2Objective(), **changes)


def masked_views(step=0, batch=3, masking=MASKING, **changes) -> Views:
    """Masks as the loader draws them, the two views of an example by one key."""
    masks = [draw_masks(masking, philox(0, step, key, MASKS_DOMAIN)) for key in range(batch)]
    stacked = torch.stack([torch.from_numpy(mask) for mask in masks], dim=1).flatten(0, 1)
    return tiny_views(step, batch, **changes)._replace(masks=stacked)


class MaskedViews(FixedViews):
    """As `FixedViews`, with masks."""

    def batches(self, start):
        step = start
        while True:
            yield [masked_views(step * self.micro + i, **self.options) for i in range(self.micro)]
            step += 1
