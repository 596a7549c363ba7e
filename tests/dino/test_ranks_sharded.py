"""Networks that are dealt out over processes (FSDP2, here over gloo on CPUs) train as whole ones do in one process."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.utils._python_dispatch import TorchDispatchMode

from hf_simprune.dino import run
from hf_simprune.dino.argument_parsing import parse_arguments
from hf_simprune.dino.checkpoint import load_checkpoint, saved_networks
from hf_simprune.dino.engine import DinoEngine
from hf_simprune.dino.export import export_model
from hf_simprune.dino.schedules import StepValues
from hf_simprune.dino.sharding import Sharding, chosen_sharding, is_sharded, own_parts
from hf_simprune.dino.snapshots import PruningSnapshots
from hf_simprune.errors import InputError
from hf_simprune.evaluation.features import build_image_processor

from ..tiny_run import metrics, words
from .conftest import tiny_dual, tiny_views
from .on_ranks import on_ranks
from .tiny_trainings import image_file, logged, training


pytestmark = pytest.mark.ranks
# of each kind of method one: in lockstep, learned gates, learned and merging, calibrated on the teacher; and DINOv2
CASES = {
    "none": ("dino", "none", {}),
    "simprune": ("dino", "simprune", {"checkpointing": True}),
    "simprune_dynamic": ("dino", "simprune_dynamic", {"clip_grad": 0.05}),
    "self_slimmed": ("dino", "self_slimmed", {}),
    "patch_slimming": ("dino", "patch_slimming", {}),
    "dinov2": ("dinov2", "simprune", {}),
}
FILES = ("student", "teacher", "optimizer")
VALUES = StepValues(1e-3, 0.04, 0.9, 0.07, False, 0.5)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {f"{file}/{name}": t for file in FILES for name, t in load_file(checkpoint / f"{file}.safetensors").items()}


def difference(one: Path, other: Path) -> float:
    """The largest between two checkpoints with tensors of the same names and shapes."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert all(second[name].shape == tensor.shape for name, tensor in first.items())
    return max((second[name].double() - tensor.double()).abs().max().item() for name, tensor in first.items())


def processor():
    return build_image_processor(16, [0.5] * 3, [0.25] * 3)


def _two(rank: int, folder: Path, images: str) -> None:
    for name, (objective, reduction, options) in CASES.items():
        trainer = training(folder / name, images, objective, reduction, sharding=Sharding(), **options)
        student = trainer.engine.dual.student
        assert trainer.accelerator.num_processes == 2 and is_sharded(student)
        here = sum(part.numel() for part in own_parts(student.parameters()))
        assert here < 0.6 * sum(parameter.numel() for parameter in student.parameters())
        trainer.train()

    # the last one again from its second step on, with other weights and its parameters kept from forward to backward
    resumed = training(folder / "resumed", images, "dinov2", "simprune", sharding=Sharding(None, False), weights=9)
    resumed.resume(str(folder / "dinov2" / "checkpoint-2"))
    resumed.train()
    engine = resumed.engine
    with engine.whole_networks():
        if rank == 0:
            export_model(folder / "export", engine.networks, processor())
            views = tiny_views(dtype=torch.float64)
            PruningSnapshots(folder / "snapshots.safetensors", engine.networks, 1)(0, views, VALUES)
    if rank == 0:  # by itself, from what it has written
        with saved_networks(folder / "resumed" / "checkpoint-4", engine):
            export_model(folder / "export-from-checkpoint", engine.networks, processor())
    with engine.whole_teacher():
        features = engine.networks.teacher.backbone(tiny_views().global_crops).last_hidden_state
    torch.save(features.detach(), folder / f"features-{rank}.pt")
    assert all(parameter.is_meta for parameter in engine.networks.parameters())

    # gradients that are not finite in one process move nothing in any
    engine = DinoEngine(tiny_dual("simprune", 0.6), Accelerator(cpu=True), sharding=Sharding())
    loss = engine.objective.loss
    before = [part.clone() for part in own_parts(engine.dual.parameters())]

    def poisoned(output, values):
        if rank == 0:
            output.student_logits.register_hook(lambda gradient: gradient * float("inf"))
        return loss(output, values)

    engine.objective.loss = poisoned
    assert engine.step([tiny_views(rank)], VALUES).skipped
    assert all(torch.equal(*pair) for pair in zip(before, own_parts(engine.dual.parameters()), strict=True))
    engine.objective.loss = loss
    assert not engine.step([tiny_views(rank), tiny_views(2 + rank)], VALUES).skipped

    # nothing of the teacher is gathered for a backward pass
    engine = DinoEngine(tiny_dual(), Accelerator(cpu=True), sharding=Sharding())
    engine.step([tiny_views(rank)], VALUES)
    with CountedGathers() as counted:
        engine.step([tiny_views(rank)], VALUES)
    torch.save(counted.count, folder / f"gathers-{rank}.pt")

    # autocast as data-parallel training has it
    AcceleratorState._reset_state()
    found = []
    for sharding in (None, Sharding()):
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        engine = DinoEngine(tiny_dual("evit", 0.6, dtype=torch.float32), accelerator, sharding=sharding)
        steps = [engine.step([tiny_views(i + rank, dtype=torch.float32)], VALUES) for i in (0, 2, 4)]
        found.append([(step.loss, step.gradient_norm) for step in steps])
        assert {part.dtype for part in own_parts(engine.dual.parameters())} == {torch.float32}
        engine.model = engine.dual
        accelerator.free_memory()
    torch.save(torch.tensor(found), folder / f"bf16-{rank}.pt")


class CountedGathers(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "c10d" and "allgather" in str(func)
        return func(*args, **(kwargs or {}))


def _four(rank: int, folder: Path, images: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    training(folder / "rows", images, "dino", "self_slimmed", sharding=Sharding(mesh)).train()


def run_options(folder: Path, images: str, batch: int) -> list[str]:
    return words(
        output_dir=folder, dataset_name_or_path=images, token_reduction="simprune", per_device_train_batch_size=batch,
        max_steps=3, warmup_steps=0, knn_every=2, save_steps=2, drop_path_rate=0,
    )  # fmt: skip


def _run(rank: int, folder: Path, images: str) -> None:
    """A run from options to card, as on GPUs where accelerate is configured for FSDP."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "chosen_sharding", lambda accelerator: Sharding())
        run.run_training(parse_arguments(run_options(folder / "run", images, 4)))
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def dealt(tmp_path_factory) -> tuple[Path, str]:
    """What two ranks, and four in two rows, have written."""
    folder = tmp_path_factory.mktemp("dealt")
    images = image_file(folder)
    on_ranks(2, _two, folder, images)
    on_ranks(4, _four, folder, images)
    on_ranks(2, _run, folder, images)
    return folder, images


@pytest.fixture(scope="module")
def whole(dealt, tmp_path_factory) -> Path:
    """The same trainings in one process that keeps everything."""
    folder = tmp_path_factory.mktemp("whole")
    for name, (objective, reduction, options) in CASES.items():
        training(folder / name, dealt[1], objective, reduction, **options).train()
    return folder


@pytest.mark.parametrize("name", CASES)
def test_losses_and_checkpoints_are_those_of_whole_networks(dealt, whole, name):
    """AdamW's moments, centres and the teacher's moving average among them."""
    folder, _ = dealt
    expected = logged(whole / name)
    assert expected.shape == (4, 3) and (logged(folder / name) - expected).abs().max() < 1e-5
    for step in (2, 4):
        assert difference(whole / name / f"checkpoint-{step}", folder / name / f"checkpoint-{step}") < 1e-7


def test_rows_that_each_keep_a_copy_train_alike(dealt, whole):
    folder, _ = dealt
    assert (logged(folder / "rows") - logged(whole / "self_slimmed")).abs().max() < 1e-5
    assert difference(whole / "self_slimmed" / "checkpoint-4", folder / "rows" / "checkpoint-4") < 1e-7


def test_a_resumed_run_ends_where_the_undisturbed_one_does(dealt):
    folder, _ = dealt
    assert difference(folder / "dinov2" / "checkpoint-4", folder / "resumed" / "checkpoint-4") == 0


def test_checkpoints_go_from_sharded_to_whole_runs(dealt, tmp_path):
    """They are those of whole networks: one process goes on from one, to the same end."""
    folder, images = dealt
    trainer = training(tmp_path / "one", images, "dinov2", "simprune", weights=9)
    trainer.resume(str(folder / "dinov2" / "checkpoint-2"))
    trainer.train()
    assert difference(folder / "dinov2" / "checkpoint-4", tmp_path / "one" / "checkpoint-4") < 1e-7


def test_the_export_is_that_of_whole_networks(dealt, tmp_path):
    folder, images = dealt
    trainer = training(tmp_path / "one", images, "dinov2", "simprune", weights=9)
    load_checkpoint(folder / "resumed" / "checkpoint-4", trainer.engine)
    export_model(tmp_path / "export", trainer.engine.networks, processor())
    for found in ("export", "export-from-checkpoint"):
        files = sorted(path.relative_to(folder / found) for path in (folder / found).rglob("*.safetensors"))
        assert len(files) == 7
        for file in files:
            expected, written = load_file(tmp_path / "export" / file), load_file(folder / found / file)
            assert expected.keys() == written.keys()
            assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    with trainer.engine.whole_teacher():
        network = trainer.engine.networks.teacher.backbone.eval()
        features = network(tiny_views().global_crops).last_hidden_state
    for rank in (0, 1):
        assert (torch.load(folder / f"features-{rank}.pt") - features).abs().max() < 1e-9
    assert "start_tokens" in load_file(folder / "snapshots.safetensors")


def test_nothing_is_gathered_twice(dealt):
    folder, _ = dealt
    # of 4 blocks the last runs as two halves; the teacher passes once, the student twice forward and twice backward.
    # A head runs for the teacher and for the student, and backward; embeddings and norms are gathered once.
    expected = (4 + 1) * (1 + 2 + 2) + 3 + 1
    assert [torch.load(folder / f"gathers-{rank}.pt") for rank in (0, 1)] == [expected] * 2


def test_a_whole_run_leaves_what_that_of_one_process_does(dealt, tmp_path):
    folder, images = dealt
    run.run_training(parse_arguments(run_options(tmp_path / "run", images, 8)))
    for name in ("loss", "knn_accuracy"):
        one, two = ([r[name] for r in metrics(where / "run") if name in r] for where in (tmp_path, folder))
        assert len(one) == 3 and two == pytest.approx(one, rel=1e-5)
    for file in sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors")):
        expected, found = load_file(tmp_path / file), load_file(folder / file)
        assert expected.keys() == found.keys()
        if file.name != "optimizer.safetensors" and "checkpoint" not in str(file):
            for name, tensor in expected.items():
                assert (found[name].double() - tensor.double()).abs().max() < 1e-4, (file, name)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {path.name for path in (folder / "run").iterdir()} == names >= {"README.md", "pruned_tokens.png"}


def test_autocast_is_that_of_data_parallel_training(dealt):
    folder, _ = dealt
    for rank in (0, 1):
        parallel, sharded = torch.load(folder / f"bf16-{rank}.pt")
        assert parallel.isfinite().all() and (sharded / parallel - 1).abs().max() < 1e-4


PLUGIN = {
    "fsdp_version": 2, "cpu_offload": OffloadPolicy(), "cpu_ram_efficient_loading": False,
    "activation_checkpointing": False, "reshard_after_forward": True,
}  # fmt: skip


def configured(**changes) -> SimpleNamespace:
    """An accelerator as accelerate's FSDP configuration makes it on GPUs, as far as it is asked."""
    precision = changes.pop("mixed_precision", "bf16")
    kind = changes.pop("distributed_type", DistributedType.FSDP)
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**PLUGIN | changes))
    return SimpleNamespace(
        distributed_type=kind, state=state, mixed_precision=precision, torch_device_mesh=None, parallelism_config=None
    )


def test_the_configuration_of_accelerate_decides():
    assert chosen_sharding(configured(distributed_type=DistributedType.MULTI_GPU)) is None
    assert chosen_sharding(configured()) == Sharding(None, True)
    assert chosen_sharding(configured(reshard_after_forward=False)) == Sharding(None, False)


def test_fsdp_that_accelerate_leaves_out_is_not_passed_over(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="FSDP.*without GPUs.*multi_gpu.yaml"):
        chosen_sharding(configured(distributed_type=DistributedType.MULTI_CPU))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fsdp_version": 1}, "fsdp_version 1"),
        ({"cpu_offload": CPUOffloadPolicy()}, "fsdp_offload_params true"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading true"),
        ({"activation_checkpointing": True}, "--gradient_checkpointing"),
        ({"mixed_precision": "fp16"}, "--fp16.*--bf16"),
    ],
)
def test_what_is_not_supported_is_refused(changes, named):
    with pytest.raises(InputError, match=named):
        chosen_sharding(configured(**changes))
