# SPDX-License-Identifier: Apache-2.0
"""What a training needs on W GPUs, from formulas: parameters, memory by part, bytes sent, operations.

Precision: fp32 weights, moments and gradients, bf16 autocast. All bytes are of one GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hf_simprune.dino.head import DinoHead
from hf_simprune.evaluation.profile import BackboneSpec, HeadSpec, training_step_macs
from hf_simprune.models.architectures import build_backbone


GLOBAL_SIZE, LOCAL_SIZE = 224, 96
PROTOTYPES = 65536
FP32, BF16 = 4, 2
# (architecture, changes): L and g by their widths, g with patches of 14 and a plain MLP as in DINOv2's sizes
NETWORKS: dict[str, tuple[str, dict[str, int]]] = {
    "ViT-S/16": ("vit_small", {}),
    "ViT-B/16": ("vit_base", {}),
    "ViT-L/16": ("vit_base", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}),
    "ViT-g/14": ("vit_base", {"hidden_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 16}),
}


@dataclass(frozen=True)
class Network:
    """Sizes of one branch. Parameters: of a block, of all blocks, of the head, of everything."""

    name: str
    spec: BackboneSpec
    block: int
    blocks: int
    head: int
    total: int


@dataclass(frozen=True)
class Memory:
    """Bytes by part."""

    weights: float
    gradients: float
    moments: float
    buckets: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def network(name: str) -> Network:
    """Counted on the real modules, built without memory."""
    architecture, changes = NETWORKS[name]
    patch = 14 if name.endswith("/14") else 16
    with torch.device("meta"):
        backbone = build_backbone(architecture, GLOBAL_SIZE, patch, **changes)
        head = DinoHead(backbone.config.hidden_size, PROTOTYPES)
    spec = BackboneSpec.from_config(backbone.config)
    block, whole, of_head = (sum(p.numel() for p in m.parameters()) for m in (backbone.layers[0], backbone, head))
    return Network(name, spec, block, block * spec.depth, of_head, whole + of_head)


def step_macs(net: Network, local_crops: int, keep_rate: float) -> float:
    """MACs of a training step for one image."""
    layers = [] if keep_rate == 1.0 else [net.spec.depth * k // 4 for k in (1, 2, 3)]
    local = (LOCAL_SIZE // net.spec.patch_size) ** 2
    patches = net.spec.num_patches(GLOBAL_SIZE)
    return training_step_macs(
        net.spec, patches, keep_rate, layers, local, local_crops, HeadSpec(out_dim=PROTOTYPES)
    ).total


def memory(net: Network, gpus: int, batch: int, local_crops: int, activation_bytes: float, sharded: bool) -> Memory:
    """Of `batch` images a GPU; `activation_bytes` is what the student's blocks keep of one image for its gradient.

    Sharded: everything that is kept of a parameter is cut into `gpus` parts; of the largest group, two are gathered at
    once. Data-parallel: the reducer's buckets hold the gradients once more. Both: bf16 copies of the weights of the
    student's blocks, kept from forward to backward pass.
    """
    part = gpus if sharded else 1
    gathered = 2 * FP32 * max(net.block, net.head) + FP32 * 2 * (net.total - net.blocks - net.head) if sharded else 0
    buckets = 2 * FP32 * max(net.block, net.head) if sharded else FP32 * net.total * (gpus > 1)
    rows = (2 + local_crops) * batch
    # fp32: the student's logits and their gradient, the teacher's with targets and their sum
    logits = FP32 * PROTOTYPES * (2 * rows + 3 * 2 * batch)
    return Memory(
        weights=FP32 * 2 * net.total / part + gathered + BF16 * net.blocks,
        gradients=FP32 * net.total / part,
        moments=2 * FP32 * net.total / part,
        buckets=buckets,
        activations=activation_bytes * batch,
        logits=logits,
    )


def bytes_sent(net: Network, gpus: int, sharded: bool, local_crops: int = 8) -> float:
    """By one GPU in one micro-batch, with ring algorithms; the centre and the step's sums are left out (0.3 MB).

    Data-parallel: an all-reduce of the gradients. Sharded: all is gathered as in `gathered_bytes`, and gradients are
    reduce-scattered once.
    """
    share = (gpus - 1) / gpus
    if not sharded:
        return 2 * share * FP32 * net.total
    return share * (gathered_bytes(net.block, net.blocks, net.head, net.total, local_crops) + FP32 * net.total)


def gathered_bytes(block: int, blocks: int, head: int, total: int, local_crops: int) -> int:
    """Whole tensors gathered in a dense DINO step: blocks for the teacher's pass, the student's global and local pass
    and the backward pass of both, the last block twice each time, as its halves run apart; a head for each of its
    passes; the rest of both branches once. Where tokens leave in the middle of a block it is as with the last one."""
    passes = 5 if local_crops else 3
    return FP32 * (passes * (blocks + block) + 3 * head + 2 * (total - blocks - head))


def objective_bytes(net: Network, gpus: int, batch: int) -> Mapping[str, float]:
    """What DINOv2's objective sends in a micro-batch: Sinkhorn's sums on CLS and on patches, KoLeo's neighbours."""
    share = (gpus - 1) / gpus
    return {
        # three iterations, each the highest and the sum of every prototype
        "Sinkhorn": 2 * 3 * 2 * (2 * share * FP32 * PROTOTYPES),
        # two views: all-gather of the features, all-reduce of their gradients
        "KoLeo": 2 * 3 * share * FP32 * gpus * batch * net.spec.hidden_size,
    }
