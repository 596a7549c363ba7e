"""Files that someone else wrote: nothing in them runs, and what is unsound is refused in words or does no harm."""

import builtins
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file

from hf_simprune.dino.build import build_dual_branch, normalisation
from hf_simprune.dino.checkpoint import find_checkpoint
from hf_simprune.dino.resolve import resolve
from hf_simprune.dino.trainer import DinoTrainer, LoopSettings
from hf_simprune.errors import InputError
from hf_simprune.models import SimPruneDeiTModel, SimPruneDinov2Model, SimPruneViTModel
from hf_simprune.models.deit import SimPruneDeiTConfig
from hf_simprune.models.dinov2 import SimPruneDinov2Config
from hf_simprune.models.vit import SimPruneViTConfig
from hf_simprune.rba.checkpoint import load_checkpoint

from ..dino.conftest import FixedViews, tiny_dual, tiny_engine, tiny_schedules
from ..dino.make_arguments import make_arguments
from ..rba.tiny_compression import save_checkpoint
from .fuzzing import SIZES, TARGETS


QUICK = [("own ViT, config", 30), ("--plan", 60)]
FULL = [pytest.param(target, 120, marks=pytest.mark.faults) for target in TARGETS]


@pytest.mark.parametrize(("target", "count"), [*QUICK, *FULL])
def test_mutated_files_are_refused_in_words_or_work(warm, target, count, tmp_path, trials):
    (tmp_path / "folder").mkdir()
    report = warm.fuzz(target, 11, count, tmp_path / "folder")
    assert not report["faults"], "\n".join(report["faults"])
    outcomes = report["outcomes"]
    assert sum(outcomes.values()) == count and 0 < outcomes["worked"] < count
    trials(f"mutated files: {target} ({', '.join(f'{n} {what}' for what, n in sorted(outcomes.items()))})", count)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return open, (self.marker, "w")


@pytest.fixture
def pickles(tmp_path, monkeypatch):
    """`pickles(folder, names)` puts payloads there; afterwards none was unpickled, nor anything else."""
    marker, seen, armed = tmp_path / "marker", [], [True]
    data = pickle.dumps(Payload(marker))
    pickle.loads(data).close()
    assert marker.exists()  # it would show
    marker.unlink()
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    sys.addaudithook(lambda event, arguments: armed and event == "pickle.find_class" and seen.append(arguments))

    def put(folder: Path, *names: str) -> None:
        for name in names:
            (folder / name).write_bytes(data)

    yield put
    armed.clear()
    assert not marker.exists() and not seen


PICKLED = ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "training_args.bin", "random_states_0.pkl", "model.pt")
FAMILIES = [
    (SimPruneViTConfig, SimPruneViTModel, {}),
    (SimPruneDeiTConfig, SimPruneDeiTModel, {}),
    (SimPruneDinov2Config, SimPruneDinov2Model, {"mlp_ratio": 2}),
]


@pytest.mark.parametrize(("config", "model", "own"), FAMILIES, ids=["vit", "deit", "dinov2"])
def test_pickled_weights_are_never_unpickled(pickles, config, model, own, tmp_path):
    sizes = {key: value for key, value in SIZES.items() if not own or key != "intermediate_size"}
    folder = tmp_path / "model"
    model(config(**sizes, **own)).save_pretrained(folder)
    pickles(folder, *PICKLED)
    model.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    for stock in (False, True):
        if stock:
            values = json.loads((folder / "config.json").read_text())
            kind = values["model_type"].removeprefix("simprune_")
            (folder / "config.json").write_text(json.dumps(values | {"model_type": kind}))
        with pytest.raises(OSError, match="no file named model.safetensors"):
            model.from_pretrained(folder)
    pickles(folder, "model.safetensors")  # by another name it is no safetensors file
    with pytest.raises(ValueError, match="cannot load"):
        model.from_pretrained(folder)


def to_train_from(folder: Path, tmp_path: Path) -> None:
    args = make_arguments(model_name_or_path=str(folder), output_dir=str(tmp_path / "run"), local_crops_number=0)
    settings = resolve(args, 1000, 1)
    normalisation(args)
    build_dual_branch(args, settings)


def test_training_and_compressing_never_unpickle(pickles, tmp_path):
    folder = Path(save_checkpoint(tmp_path / "model"))
    pickles(folder, *PICKLED)
    load_checkpoint(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"--model_name_or_path .*no file named model.safetensors"):
        load_checkpoint(str(folder))
    with pytest.raises(InputError, match=r"--model_name_or_path .*no file named model.safetensors"):
        to_train_from(folder, tmp_path)


def test_resuming_never_unpickles(pickles, tmp_path):
    Accelerator(cpu=True)

    def trainer() -> DinoTrainer:
        settings = LoopSettings(tmp_path, images_per_step=3, disable_tqdm=True)
        engine = tiny_engine(tiny_dual(dtype=torch.float32))
        return DinoTrainer(engine, tiny_schedules(2), FixedViews(dtype=torch.float32), settings)

    trainer().train()
    checkpoint = find_checkpoint(tmp_path, "latest")
    pickles(checkpoint, *PICKLED)
    trainer().resume("latest")
    for name in ("optimizer.safetensors", "student.safetensors"):
        sound = (checkpoint / name).read_bytes()
        pickles(checkpoint, name)
        with pytest.raises(InputError, match=name):
            trainer().resume("latest")
        (checkpoint / name).write_bytes(sound)


def test_code_beside_a_model_is_not_run_and_nobody_is_asked_to(tmp_path, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("the terminal was asked"))
    marker = tmp_path / "marker"
    folder = Path(save_checkpoint(tmp_path / "model"))
    (folder / "evil.py").write_text(f'open({str(marker)!r}, "w").close()\nclass Evil: pass\n')
    kinds_in = {"preprocessor_config.json": ("AutoImageProcessor",), "config.json": ("AutoConfig", "AutoModel")}
    for file, kinds in kinds_in.items():
        path = folder / file
        values = json.loads(path.read_text())
        values |= {"auto_map": dict.fromkeys(kinds, "evil.Evil")}
        values |= {"model_type": "evil"} if file == "config.json" else {"image_processor_type": "Evil"}
        path.write_text(json.dumps(values))
        for read in (lambda: load_checkpoint(str(folder)), lambda: to_train_from(folder, tmp_path)):
            with pytest.raises(InputError, match="--model_name_or_path"):
                read()
    assert not marker.exists()


def test_a_plan_that_would_fill_the_memory_is_refused(tmp_path):
    from hf_simprune.rba.plan import CompressionPlan

    for text in ('{"depth": 1000000000000, "spans": [{"start": 1, "end": 99999999999}]}', "[" * 100_000):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(InputError, match="10,000|nested too deeply"):
            CompressionPlan.load(tmp_path / "plan.json")


def test_a_configuration_of_a_network_that_no_machine_holds_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for setting, value in (("num_hidden_layers", 10**9), ("hidden_size", 10**9), ("num_attention_heads", 0)):
        for kind, model in (("vit", SimPruneViTModel), ("dinov2", SimPruneDinov2Model)):
            (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, setting: value}))
            with pytest.raises((ValueError, StrictDataclassError), match=f"{setting} must be from 1 to"):
                model.from_pretrained(tmp_path)
            with pytest.raises(InputError, match=f"{setting} must be from 1 to"):
                load_checkpoint(str(tmp_path))
