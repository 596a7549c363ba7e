"""Mutated folders, plans, settings and checkpoints, each given to what reads it; runs in a process of its own.

What is read may be refused by the errors a program expects, or must work. Everything else is written down: other
errors, files opened for writing elsewhere, programs, connections and code that were started, ten seconds of work.
"""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from hf_simprune.errors import InputError

from .fuzzed_states import trainer_states
from .mutations import mutated_safetensors, mutated_text


SECONDS = 10  # of work for one of them
_MEMORY = 3 * 2**30  # bytes that all of them may ask for beyond what is in use at the start
_STARTED = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "ctypes.dlopen"}
EVIL = 'open({marker!r}, "w").close()\nclass Evil: pass\n'
MODEL_ERRORS = (ValueError, OSError, SafetensorError, StrictDataclassError)  # the last names the setting and its type

Change = Callable[[random.Random], str]


class TooLong(BaseException):
    """Not an Exception, so that nothing takes it for one that it expects."""


class Trespasses:
    """What was done outside of one folder, as the interpreter tells."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.found: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str):
            path, mode, flags = arguments
            written = (mode and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if written and not path.startswith(self.folder) and path != os.devnull:
                self.found.append(f"{path} was opened for writing")
        elif event in _STARTED and arguments != ("libc.so.6",):
            self.found.append(f"{event} {str(arguments)[:80]}")
        elif event == "pickle.find_class":
            self.found.append(f"unpickled {arguments}")
        elif event == "exec" and arguments[0].co_filename.startswith(self.folder):
            self.found.append(f"ran {arguments[0].co_filename}")


def fuzz(target: str, seed: int, count: int, folder: str, report: str) -> int:
    """Try `count` mutations on a target; writes a JSON report. The progress file names the one at work."""
    place = Path(folder)
    make = TARGETS[target]
    torch.set_num_threads(1)
    with _quiet():
        change, read, allowed = make(place)
    soft = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _too_long)
    chance = random.Random(f"{target}:{seed}")
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    trespasses = Trespasses(place)
    progress = open(f"{report}.progress", "w")  # noqa: SIM115
    for trial in range(count):
        done = change(chance)
        progress.seek(0)
        progress.write(f"trial {trial} of {target}, seed {seed}: {done}".ljust(300))
        progress.flush()
        trespasses.found.clear()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with _quiet():
                read()
            outcomes["worked"] += 1
        except allowed as error:
            outcomes[f"refused by {type(error).__name__}"] += 1
            if not str(error).strip() or (isinstance(error, InputError) and "\n" in str(error)):
                faults.append(f"{trial}: {done}: says nothing, or more than a line: {str(error)!r}")
        except TooLong:
            faults.append(f"{trial}: {done}: took more than {SECONDS} s")
        except BaseException as error:
            faults.append(f"{trial}: {done}: {type(error).__name__}: {str(error)[:300]}")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        faults += [f"{trial}: {done}: {found}" for found in set(trespasses.found)]
        if (place / "marker").exists():
            faults.append(f"{trial}: {done}: code of the folder ran")
            (place / "marker").unlink()
    Path(report).write_text(json.dumps({"outcomes": outcomes, "faults": faults}))
    return 0


def _too_long(*_: object) -> None:
    raise TooLong


@contextlib.contextmanager
def _quiet():
    with (
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


# Targets: what is changed, what reads it, and the errors it may be refused by.


Target = tuple[Change, Callable[[], object], tuple[type[BaseException], ...]]
SIZES = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def _model_folder(place: Path, kind: str) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    from hf_simprune.evaluation.features import build_image_processor
    from hf_simprune.models import SimPruneDinov2Config, SimPruneDinov2Model, SimPruneViTConfig, SimPruneViTModel

    torch.manual_seed(0)
    if kind == "stock":
        model = ViTForImageClassification(ViTConfig(**SIZES, num_labels=4))
    elif kind == "vit":
        model = SimPruneViTModel(SimPruneViTConfig(**SIZES, block_maps={"1": {"kind": "linear"}}))
    else:
        sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
        model = SimPruneDinov2Model(SimPruneDinov2Config(**sizes, mlp_ratio=2, token_reduction="tome", keep_rate=0.7))
    folder = place / "model"
    model.save_pretrained(folder)
    build_image_processor(SIZES["image_size"], (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).save_pretrained(folder)
    (folder / "evil.py").write_text(EVIL.format(marker=str(place / "marker")))
    shutil.copytree(folder, place / "sound")
    return folder


def _change_files(folder: Path, names: tuple[str, ...], at_most: int | None = None) -> Change:
    """Puts the sound files back, then changes one of them."""
    sound = folder.with_name("sound")

    def change(chance: random.Random) -> str:
        name = chance.choice(names)
        for file in names:
            shutil.copy(sound / file, folder / file)
        path = folder / name
        if name.endswith(".safetensors"):
            data, done = mutated_safetensors(path.read_bytes(), chance)
            path.write_bytes(data)
        else:
            text, done = mutated_text(path.read_text(), chance)
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return f"{name}: {done}"

    return change


def _forward(model: torch.nn.Module) -> None:
    size = model.config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    with torch.no_grad():
        model.eval()(torch.zeros(1, model.config.num_channels, height, width))


def _from_pretrained(kind: str, names: tuple[str, ...]) -> Callable[[Path], Target]:
    def make(place: Path) -> Target:
        from hf_simprune.models import SimPruneDinov2Model, SimPruneViTForImageClassification, SimPruneViTModel

        folder = _model_folder(place, kind)
        classes = {"stock": SimPruneViTForImageClassification, "vit": SimPruneViTModel, "dinov2": SimPruneDinov2Model}

        def read() -> None:
            try:
                model = classes[kind].from_pretrained(folder)
            except RuntimeError as error:
                if "ignore_mismatched_sizes" not in str(error):
                    raise
                raise ValueError("weights of other sizes, in transformers' own words") from error
            _forward(model)

        return _change_files(folder, names), read, MODEL_ERRORS

    return make


def _to_compress(place: Path) -> Target:
    from hf_simprune.rba.adapters import adapter_for
    from hf_simprune.rba.checkpoint import load_checkpoint

    folder = _model_folder(place, "stock")

    def read() -> None:
        checkpoint = load_checkpoint(str(folder))
        adapter_for(checkpoint.model)

    names = ("config.json", "preprocessor_config.json", "model.safetensors")
    return _change_files(folder, names), read, (InputError,)


def _to_train(place: Path) -> Target:
    from hf_simprune.dino.argument_parsing import parse_arguments
    from hf_simprune.dino.build import build_dual_branch, normalisation
    from hf_simprune.dino.resolve import resolve
    from hf_simprune.dino.validation import validate

    from ..tiny_run import words

    folder = _model_folder(place, "stock")
    start = dict.fromkeys(("architecture", "config_overrides", "image_size", "patch_size"))

    def read() -> None:
        args = parse_arguments(
            words(**start, model_name_or_path=folder, output_dir=place / "run", dataset_name_or_path="none")
        )
        validate(args)
        settings = resolve(args, 40, 1)
        normalisation(args)
        build_dual_branch(args, settings)

    names = ("config.json", "preprocessor_config.json", "model.safetensors")
    return _change_files(folder, names), read, (InputError,)


def _plans(place: Path) -> Target:
    from hf_simprune.rba.plan import CompressionPlan, Half, Span

    path, sound = place / "plan.json", place / "sound.json"
    CompressionPlan(
        12, (Span(2, 4), Span(6, 7, "low_rank", 4)), (Half(8, "mlp", "linear"), Half(9, "attention", "const"))
    ).save(sound)

    def change(chance: random.Random) -> str:
        text, done = mutated_text(sound.read_text(), chance)
        if chance.random() < 0.3:
            tree = {
                "depth": chance.choice((3, 12, 10**12)),
                "spans": [{"start": 1, "end": chance.choice((2, 10**11))}],
            }
            text, done = json.dumps(tree), str(tree)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return done

    def read() -> None:
        plan = CompressionPlan.load(path)
        assert str(plan) and len(plan.removed_blocks) < plan.depth
        assert CompressionPlan.from_dict(plan.to_dict()) == plan

    return change, read, (InputError,)


def _settings(place: Path) -> Target:
    """A file of options, given with --config."""
    from hf_simprune.dino.argument_parsing import parse_arguments
    from hf_simprune.dino.resolve import resolve
    from hf_simprune.dino.validation import validate

    from ..tiny_run import OPTIONS

    path = place / "options.yaml"
    sound = json.dumps({**OPTIONS, "output_dir": "out", "dataset_name_or_path": "none"})

    def change(chance: random.Random) -> str:
        text, done = mutated_text(sound, chance)
        if chance.random() < 0.1:
            tag = chance.choice(("!!python/object/apply:os.system [touch marker]", "&a [*a, *a]", "!x y", "? [a]"))
            text, done = f"output_dir: {tag}\n", tag
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return done

    def read() -> None:
        args = parse_arguments(["--config", str(path)])
        validate(args)
        resolve(args, 40, 1)

    return change, read, (InputError,)


def _resumed(place: Path) -> Target:
    """A training checkpoint."""
    from accelerate import Accelerator

    from hf_simprune.dino.checkpoint import list_checkpoints
    from hf_simprune.dino.trainer import DinoTrainer, LoopSettings

    from ..dino.conftest import FixedViews, tiny_dual, tiny_engine, tiny_schedules

    Accelerator(cpu=True)
    views = {"dtype": torch.float32}

    def trainer() -> DinoTrainer:
        settings = LoopSettings(place, images_per_step=3, save_steps=1, save_total_limit=None, disable_tqdm=True)
        engine = tiny_engine(tiny_dual(dtype=torch.float32))
        return DinoTrainer(engine, tiny_schedules(2), FixedViews(**views), settings)

    trainer().train()
    folder = list_checkpoints(place)[-1]
    shutil.copytree(folder, folder.with_name("sound"))
    again = trainer()

    def read() -> None:
        again.resume(str(folder))

    return _change_files(folder, tuple(sorted(path.name for path in folder.iterdir()))), read, (InputError,)


_CONFIG, _WEIGHTS = ("config.json",), ("model.safetensors",)
TARGETS: dict[str, Callable[[Path], Target]] = {
    "own ViT, config": _from_pretrained("vit", _CONFIG),
    "own ViT, safetensors": _from_pretrained("vit", _WEIGHTS),
    "stock ViT, config": _from_pretrained("stock", _CONFIG),
    "stock ViT, safetensors": _from_pretrained("stock", _WEIGHTS),
    "own DINOv2, config": _from_pretrained("dinov2", _CONFIG),
    "compress MODEL": _to_compress,
    "--model_name_or_path": _to_train,
    "--plan": _plans,
    "--config": _settings,
    "--resume_from_checkpoint": _resumed,
    "trainer_state.json": trainer_states,
}
