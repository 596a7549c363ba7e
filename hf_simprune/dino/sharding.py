# SPDX-License-Identifier: Apache-2.0
"""Student and teacher dealt out over processes (FSDP2): every process keeps a part of each parameter.

Blocks and heads of both branches are gathered one at a time when they compute; embeddings, norms and what the token
reduction learns are one more group, gathered for the whole pass. Both branches are cut alike, so that the teacher's
moving average, AdamW and clipping work on parts without communication (but for the norms). A head is a group of its
own because its prototypes are read without calling the weight-normalised layer, whose hooks would not run.

Functions here do no communication for modules that are not sharded.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard

from ..errors import InputError
from .head import DinoHead


if TYPE_CHECKING:
    from .dual_branch import DualBranch

_ON_ANY_DEVICE = ("eager", "sdpa")


@dataclass(frozen=True)
class Sharding:
    """How parameters are dealt out.

    mesh: processes in one dimension, or in two to keep a copy in every row (HSDP); None for all processes in one.
    reshard_after_forward: give a block's gathered parameters up between forward and backward pass: less memory, more
    communication.

    Parameters are gathered and gradients reduced in the parameters' own precision; autocast decides what is computed
    in a lower one, as without sharding. Under autocast FSDP's own mixed precision would round layer norms and the
    position in the curriculum.
    """

    mesh: DeviceMesh | None = None
    reshard_after_forward: bool = True


def chosen_sharding(accelerator: Accelerator) -> Sharding | None:
    """As accelerate's configuration wants it, None where it does not ask for FSDP.

    Raises:
        InputError: a setting that DINO training does not support, or FSDP without GPUs.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            raise InputError(
                "accelerate's configuration asks for FSDP, which it leaves out without GPUs: launch with another one, "
                "such as cpu.yaml or multi_gpu.yaml"
            )
        return None
    plugin = accelerator.state.fsdp_plugin
    refused = {
        f"fsdp_version {plugin.fsdp_version}: only 2 is supported": plugin.fsdp_version != 2,
        "fsdp_offload_params true: not supported, leave it out": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_cpu_ram_efficient_loading true: not supported, set it to false": plugin.cpu_ram_efficient_loading,
        "fsdp_activation_checkpointing true: use --gradient_checkpointing instead": plugin.activation_checkpointing,
    }
    for message, wanted in refused.items():
        if wanted:
            raise InputError(f"accelerate's configuration has {message}")
    if accelerator.mixed_precision == "fp16":
        raise InputError("--fp16: with FSDP use --bf16, or neither")
    mesh, parallelism = accelerator.torch_device_mesh, accelerator.parallelism_config
    if mesh is not None and parallelism is not None:
        mesh = mesh[tuple(parallelism.fsdp_dim_names)]
    return Sharding(mesh, bool(plugin.reshard_after_forward))


def shard_branches(dual: "DualBranch", sharding: Sharding, device: torch.device) -> None:
    """Cut student and teacher alike, group after group, so that no device holds more than a group at once.

    The same weights must be there in all processes. Parameters stay as they are named; gradients come averaged over
    processes and cut.
    """
    mesh = sharding.mesh or init_device_mesh(device.type, (dist.get_world_size(),))
    for branch in (dual.student, dual.teacher):
        heads = [module for module in branch.modules() if isinstance(module, DinoHead)]
        reshard = sharding.reshard_after_forward or branch is dual.teacher  # which has no backward pass
        for group in (*branch.backbone.layers, *heads):
            fully_shard(group, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(dual, mesh=mesh, reshard_after_forward=False)
    _prefetch(dual)


def _prefetch(dual: "DualBranch") -> None:
    """Say what is gathered ahead in the backward pass: the student's block below. By itself FSDP takes what ran
    before, which may be the teacher's block, and keeps that to the end."""
    layers: list[Any] = list(dual.student.backbone.layers)  # with FSDP's own methods, as all below
    heads: list[Any] = [module for module in dual.student.modules() if isinstance(module, DinoHead)]
    for layer, below in zip(layers, [dual, *layers[:-1]], strict=True):  # those of `dual` are there all the time
        layer.set_modules_to_backward_prefetch([below])
    for head in heads:
        head.set_modules_to_backward_prefetch([layers[-1]])
    whole: Any = dual
    whole.set_modules_to_backward_prefetch(heads[-1:])


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(part, FSDPModule) for part in module.modules())


def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process keeps of each; work in place on them changes the whole."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is dealt out; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a module's state, or of a dictionary, whole; all processes must call it.

    What is dealt out comes on the CPU and in the main process alone, gathered one tensor at a time; what is not comes
    as it is.
    """
    found = {}
    main = not dist.is_initialized() or dist.get_rank() == 0
    for name, tensor in _tensors(source).items():
        if not isinstance(tensor, DTensor):
            found[name] = tensor
        else:
            dealt: Any = tensor.detach()  # still a `DTensor`
            gathered = dealt.full_tensor()
            if main:
                found[name] = gathered.cpu()
    return found


@torch.no_grad()
def load_full_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `full_tensors`: each process takes its parts of whole tensors, which all of them have."""
    if not is_sharded(module) and not any(isinstance(tensor, DTensor) for tensor in module.state_dict().values()):
        module.load_state_dict(tensors)
        return
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, DTensor):
            tensor.to_local().copy_(_cut(tensors[name], tensor.device_mesh, tensor.placements))
        else:
            tensor.copy_(tensors[name])


def dealt_out_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor cut as `parameter` is, if that is dealt out and of the same shape; on its device in any case."""
    if not isinstance(parameter, DTensor):
        return tensor
    if tensor.shape != parameter.shape:
        return tensor.to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    part = _cut(tensor, mesh, placements).to(parameter.device, copy=True)
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


class PlainCopy:
    """Unsharded networks for all that is done outside of a training step; memory is taken only while they are filled.

    Made of `dual` before that is sharded; `networks` stays the same object for good.
    """

    def __init__(self, dual: "DualBranch") -> None:
        empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in dual.parameters()}
        self.networks = copy.deepcopy(dual, empty)
        for branch in (self.networks.student, self.networks.teacher):
            if branch.backbone.config._attn_implementation not in _ON_ANY_DEVICE:
                branch.backbone.set_attn_implementation("sdpa")

    @contextmanager
    def filled(self, part: str, source: "DualBranch", device: torch.device | str, everywhere: bool) -> Iterator[None]:
        """`networks.<part>` ("" for all) holds what the sharded `source` does, on `device`, in every process or in the
        main process alone; all processes must enter."""
        here, there = self.networks.get_submodule(part), source.get_submodule(part)
        wanted = everywhere or dist.get_rank() == 0
        if wanted:
            here.to_empty(device=device)
        try:
            with torch.no_grad():
                targets = {**dict(here.named_parameters()), **dict(here.named_buffers())}
                # a buffer that no state has is copied too
                for name, tensor in {**dict(there.named_buffers()), **there.state_dict()}.items():
                    gathered = whole(tensor.detach())
                    if wanted:
                        targets[name].copy_(gathered)
            yield
        finally:
            here.to("meta")

    @contextmanager
    def filled_with(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Iterator[None]:
        """`networks` holds these tensors, in the process that calls it."""
        self.networks.to_empty(device="cpu")
        try:
            self.networks.student.load_state_dict(student)
            self.networks.teacher.load_state_dict(teacher)
            yield
        finally:
            self.networks.to("meta")


def _tensors(source: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return source.state_dict() if isinstance(source, nn.Module) else source


def _cut(tensor: Tensor, mesh: DeviceMesh, placements: Iterable[Placement]) -> Tensor:
    """The part of a whole tensor that belongs to this process."""
    for dimension, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = tensor.chunk(mesh.size(dimension), placement.dim)
            place = mesh.get_local_rank(dimension)
            # fewer rows than processes: the last ones have none
            tensor = parts[place] if place < len(parts) else tensor.narrow(placement.dim, 0, 0)
    return tensor
