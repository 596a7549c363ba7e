# SPDX-License-Identifier: Apache-2.0
"""How a training grows with processes, crops and network: the figures of docs/scaling.md.

Measured here: CPU seconds a step and bytes handed to collectives, of one process and of two (gloo), data-parallel and
sharded; what the student's blocks keep of an image for the backward pass. Calculated: memory, bytes and seconds on
GPUs.

    python -W ignore benchmarks/scaling.py
    python -W ignore benchmarks/scaling.py --calculated_only
"""

import argparse
import os
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any


# Idle threads must sleep: a spinning one would be counted as work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from _engine import VALUES, Setting, build_engine, random_crops  # noqa: E402
from _measure import emit, header  # noqa: E402
from _scaling import (  # noqa: E402
    GLOBAL_SIZE,
    LOCAL_SIZE,
    NETWORKS,
    bytes_sent,
    gathered_bytes,
    memory,
    network,
    objective_bytes,
    step_macs,
)
from accelerate.state import AcceleratorState  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from hf_simprune.dino.objective import Views  # noqa: E402
from hf_simprune.dino.sharding import Sharding  # noqa: E402
from hf_simprune.models.architectures import build_backbone  # noqa: E402


SIDES = ("one process", "two, data-parallel", "two, sharded")
WARMUP = 2
# What is assumed of a GPU in the calculated table, beside 80 GB of memory.
TFLOPS, NEAR_GBYTES, FAR_GBYTES = 200.0, 300.0, 40.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="vit_tiny")
    parser.add_argument("--batch", type=int, default=4, help="images a process")
    parser.add_argument("--local_crops_number", type=int, default=2)
    parser.add_argument("--out_dim", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calculated_only", action="store_true", help="neither steps nor activations are measured")
    parser.add_argument("--json", help="file to write all numbers to")
    return parser.parse_args()


class CommunicatedBytes(TorchDispatchMode):
    """Bytes of the whole tensors that collectives of this process work on, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor)]
            # a gather has whole and part among its tensors
            self.bytes[func._opname.strip("_")] += max(sizes, default=0) if "base" in func._opname else sum(sizes)
        return func(*args, **(kwargs or {}))


def measure_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Both sides of two processes in one pair of them, one process by itself; all forked from here."""
    context = mp.get_context("fork")
    found: dict[str, Any] = {}
    for world, sides in ((1, SIDES[:1]), (2, SIDES[1:])):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        queue = context.SimpleQueue()
        mp.start_processes(_steps, (world, port, args, sides, queue), nprocs=world, start_method="fork")
        for _ in range(world * len(sides)):
            side, record = queue.get()
            found.setdefault(side, []).append(record)
    return found


def _steps(rank: int, world: int, port: int, args: argparse.Namespace, sides: tuple[str, ...], queue: Any) -> None:
    os.environ |= {"ACCELERATE_USE_CPU": "true"}
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(True)
    torch.set_num_threads(1)
    setting = Setting(
        args.architecture, args.batch, args.local_crops_number, args.out_dim, 0.0, False, torch.device("cpu"),
        args.seed + rank,
    )  # fmt: skip
    crops = random_crops(setting)
    views = Views(torch.cat(crops[:2]), torch.cat(crops[2:]) if len(crops) > 2 else None)
    for side in sides:
        engine = build_engine(setting, 1.0, sharding=Sharding() if side.endswith("sharded") else None)
        assert engine.accelerator.num_processes == world
        for _ in range(WARMUP):
            engine.step([views], VALUES)
        with CommunicatedBytes() as counted:
            engine.step([views], VALUES)
        cpu, wall = [], []
        for _ in range(args.rounds):
            started, worked = time.perf_counter(), time.process_time()
            engine.step([views], VALUES)
            cpu.append(time.process_time() - worked)
            wall.append(time.perf_counter() - started)
        student = engine.dual.student
        parts = {"block": student.backbone.layers[0], "blocks": student.backbone.layers}
        parts |= {"head": student.head, "total": student}
        sizes = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
        queue.put((side, {"cpu": cpu, "wall": wall, "bytes": dict(counted.bytes), "sizes": sizes}))
        engine.model = engine.dual  # a wrapper that outlives its group hangs
        engine.accelerator.free_memory()
    if world > 1:
        torch.distributed.destroy_process_group()


def table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)


def print_steps(args: argparse.Namespace, found: dict[str, Any]) -> None:
    crops = f"2x{GLOBAL_SIZE} + {args.local_crops_number}x{LOCAL_SIZE}"
    print(f"\nMeasured: {args.architecture}, {crops}, {args.out_dim} prototypes, {args.batch} images a process, fp32")
    base, rows = None, []
    for side, ranks in found.items():
        cpu = statistics.median(second for rank in ranks for second in rank["cpu"]) / args.batch
        base = base or cpu
        wall = statistics.median(second for rank in ranks for second in rank["wall"])
        kinds = ", ".join(f"{kind} {size / 1e6:.2f}" for kind, size in sorted(ranks[0]["bytes"].items()))
        rows.append((side, f"{cpu:.3f}", f"{cpu / base:.2f}", f"{wall:.2f}", kinds or "none"))
    table(("", "CPU s an image", "relative", "wall s a step", "MB in collectives a step, by kind"), rows)
    sizes = next(iter(found.values()))[0]["sizes"]
    reduced, gathered = 4 * sizes["total"], gathered_bytes(**sizes, local_crops=args.local_crops_number)
    print(f"calculated by the formulas: {reduced / 1e6:.2f} reduced, and {gathered / 1e6:.2f} gathered where sharded")


def activation_bytes(name: str, image_size: int, checkpointing: bool) -> int:
    """What one block keeps of one image for the backward pass under bf16 autocast: measured on one block at batch 1
    and 2, so that what does not grow with the batch, such as copies of weights, drops out."""
    architecture, changes = NETWORKS[name]
    patch = 14 if name.endswith("/14") else 16
    net = build_backbone(architecture, GLOBAL_SIZE, patch, **{**changes, "num_hidden_layers": 1}).train()
    if checkpointing:
        net.activation_checkpointing_enable()
    tokens = (image_size // patch) ** 2 + 1
    kept = [_kept_bytes(net.layers[0], torch.randn(rows, tokens, net.config.hidden_size)) for rows in (1, 2)]
    return kept[1] - kept[0]


def _kept_bytes(block: nn.Module, inputs: Tensor) -> int:
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        output = block(inputs)
    del output
    return sum(storages.values())


def measure_activations() -> dict[str, dict[str, int]]:
    """By network and kind of crop, the bytes of one block."""
    print("\nMeasured: MB that one block keeps of one crop for the backward pass, bf16 autocast")
    found = {}
    for name in NETWORKS:
        # a local crop of 98 pixels where patches have 14
        small = 98 if name.endswith("/14") else LOCAL_SIZE
        sizes = {"global": GLOBAL_SIZE, "local": small}
        found[name] = {kind: activation_bytes(name, size, False) for kind, size in sizes.items()}
        found[name] |= {f"{kind}_checkpointed": activation_bytes(name, size, True) for kind, size in sizes.items()}
    rows = [(name, *(f"{size / 1e6:.2f}" for size in sizes.values())) for name, sizes in found.items()]
    table(("", "224 px", "96 px", "224 px, gradient checkpointing", "96 px, gradient checkpointing"), rows)
    return found


def calculate(name: str, gpus: int, batch: int, sharded: bool, kept: dict[str, int] | None) -> dict[str, Any]:
    """Memory and time of a step with 8 local crops; `kept` are the bytes of a block by kind of crop."""
    net = network(name)
    activations = 0.0 if kept is None else net.spec.depth * (2 * kept["global"] + 8 * kept["local"])
    needs = memory(net, gpus, batch, 8, activations, sharded)
    sent = bytes_sent(net, gpus, sharded)
    return {
        "network": name,
        "gpus": gpus,
        "batch": batch,
        "how": "sharded" if sharded else "data-parallel" if gpus > 1 else "alone",
        "memory": {**vars(needs), "total": needs.total},
        "sent": sent,
        "computing": 2 * batch * step_macs(net, 8, 1.0) / (TFLOPS * 1e12),
        "sending": sent / (1e9 * (NEAR_GBYTES if gpus <= 8 else FAR_GBYTES)),
    }


def print_calculated(activations: dict[str, dict[str, int]] | None) -> list[dict[str, Any]]:
    """From 1 to 1,024 GPUs."""
    print(
        f"\nCalculated: 2x224 + 8x96, 65,536 prototypes, bf16; a GPU does {TFLOPS:.0f} TFLOP/s and sends "
        f"{NEAR_GBYTES:.0f} GB/s within a machine of 8 and {FAR_GBYTES:.0f} GB/s between machines"
    )
    found = [
        calculate(name, gpus, batch, sharded, activations and activations[name])
        for name in NETWORKS
        for gpus, batch in ((1, 64), (8, 64), (64, 16), (1024, 4))
        for sharded in (False, True)[: 1 + (gpus > 1)]
    ]
    rows = []
    for each in found:
        needs = {part: size / 1e9 for part, size in each["memory"].items()}
        state = needs["gradients"] + needs["moments"] + needs["buckets"]
        parts = (needs["weights"], state, needs["activations"], needs["logits"])
        rows.append(
            (
                *(each[key] for key in ("network", "gpus", "batch", "how")),
                *(f"{part:.1f}" for part in (*parts, needs["total"])),
                f"{each['sent'] / 1e9:.2f}",
                f"{each['computing']:.3f}",
                f"{each['sending']:.3f}",
            )
        )
    names = ("network", "GPUs", "images a GPU", "how", "GB: weights", "gradients, moments", "activations", "logits")
    table((*names, "all", "GB sent a step", "computing, s", "sending, s"), rows)
    return found


def print_networks() -> None:
    print("\nCalculated: parameters of a branch with its head, GFLOPs of a step for an image, and what DINOv2's")
    print("objective sends in a step, Sinkhorn + KoLeo, on 8 x 64 and on 1,024 x 4 images")
    rows = []
    for name in NETWORKS:
        net = network(name)
        flops = (f"{2 * step_macs(net, 8, rate) / 1e9:.0f}" for rate in (1.0, 0.7))
        extra = [objective_bytes(net, *many) for many in ((8, 64), (1024, 4))]
        sent = (f"{each['Sinkhorn'] / 1e6:.1f} + {each['KoLeo'] / 1e6:.1f}" for each in extra)
        rows.append((name, f"{net.total / 1e6:.1f}", *flops, *sent))
    table(("", "parameters, M", "GFLOPs", "at keep rate 0.7", "MB on 8 GPUs", "MB on 1,024 GPUs"), rows)


def main() -> None:
    args = parse()
    report: dict[str, Any] = header(torch.device("cpu"), args.seed)
    for key, value in report.items():
        print(f"{key}: {value}")
    activations = None
    if not args.calculated_only:
        report["steps"] = measure_steps(args)
        print_steps(args, report["steps"])
        activations = report["activations"] = measure_activations()
    report["calculated"] = print_calculated(activations)
    print_networks()
    emit(report, args.json)


if __name__ == "__main__":
    main()
