"""Two processes compute what one does with the same global batch, and neither waits for ever when one is gone."""

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from hf_simprune.dino.online_knn import OnlineKnn
from hf_simprune.dino.processes import LostProcessError, raise_if_lost
from hf_simprune.dino.run import build_accelerator
from hf_simprune.evaluation import knn
from hf_simprune.evaluation.features import build_image_processor
from hf_simprune.models.architectures import build_backbone

from .conftest import TINY
from .make_arguments import make_arguments
from .on_ranks import join_ranks, on_ranks
from .test_online_knn import labelled
from .tiny_trainings import CASES, image_file, logged, training


pytestmark = pytest.mark.ranks
BANK, QUERIES = 31, 9  # neither divides by two


def train(folder: Path, images: str, objective: str, reduction: str) -> None:
    trainer = training(folder, images, objective, reduction, save_steps=100)
    trainer.train()
    trainer.engine.model = trainer.engine.dual  # a wrapper that outlives its group hangs
    trainer.accelerator.free_memory()


def predictions(accelerator: Accelerator) -> list[torch.Tensor]:
    """Of the k-NN during training, by CLS and by the mean patch token."""
    torch.manual_seed(0)
    network = build_backbone("vit_micro", image_size=16, patch_size=4, **TINY)
    processor = build_image_processor(16, [0.5] * 3, [0.25] * 3)
    found, predict = [], knn.knn_predict

    def recorded(*args, **options):
        found.append(predict(*args, **options))
        return found[-1]

    bank, queries = labelled(range(BANK)), labelled(range(BANK, BANK + QUERIES))
    evaluate = OnlineKnn(network, processor, bank, queries, 5, 0.07, accelerator, batch_size=4, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "knn_predict", recorded)
        evaluate(0)
    return found


def _rank(rank: int, folder: Path, images: str) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2 and accelerator.process_index == rank
    for objective, reduction in CASES:
        train(folder / objective / reduction, images, objective, reduction)
    torch.save(predictions(accelerator), folder / f"knn-{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, str]:
    """Everything that two ranks are asked to do here, done at once."""
    folder = tmp_path_factory.mktemp("two")
    images = image_file(folder)
    on_ranks(2, _rank, folder, images)
    return folder, images


@pytest.mark.parametrize(("objective", "reduction"), CASES)
def test_losses_and_networks_are_those_of_one_process(two, tmp_path, objective, reduction):
    """With drop path 0: what a rank drops is drawn by torch's generator, which every rank seeds by its number.

    Crops, masks and the tokens that leave at random are functions of seed, epoch and example; KoLeo's neighbours,
    Sinkhorn's sums, centres, gates and calibrations are those of all ranks.
    """
    folder, images = two
    train(tmp_path / "one", images, objective, reduction)
    expected, found = logged(tmp_path / "one"), logged(folder / objective / reduction)
    assert expected.shape == (4, 3) and expected[:, 0].unique().numel() == 4
    assert (found - expected).abs().max() < 1e-5
    for file in ("student", "teacher"):
        one, both = (
            load_file(where / "checkpoint-4" / f"{file}.safetensors")
            for where in (tmp_path / "one", folder / objective / reduction)
        )
        assert max((both[name] - tensor).abs().max() for name, tensor in one.items()) < 1e-6


def test_knn_predictions_are_those_of_one_process(two):
    folder, _ = two
    expected = predictions(Accelerator(cpu=True))
    assert len(expected) == 2 and all(len(kind) == QUERIES for kind in expected)
    for rank in (0, 1):
        for kind, wanted in zip(torch.load(folder / f"knn-{rank}.pt"), expected, strict=True):
            assert torch.equal(kind, wanted)


def _waits(rank: int, port: int, folder: Path, end: str) -> None:
    """Rank 0 waits for rank 1, which has been killed or does not come; it writes down what it raised, and when."""
    join_ranks(rank, 2, port)
    accelerator = build_accelerator(make_arguments(ddp_timeout=3 if end == "hangs" else 600))
    accelerator.wait_for_everyone()
    if rank == 1:
        if end == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    started = time.monotonic()
    try:
        try:
            accelerator.wait_for_everyone()
        except RuntimeError as error:
            raise_if_lost(error, folder)
            raise
    except LostProcessError as error:
        (folder / "said").write_text(f"{time.monotonic() - started:.1f} {error}")


@pytest.mark.parametrize("end", ["is killed", "hangs"])
def test_a_process_whose_partner_is_gone_ends_with_one_line(tmp_path, end):
    (tmp_path / "checkpoint-12").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_waits, args=(rank, port, tmp_path, end)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    ranks[0].join(90)
    ended = ranks[0].exitcode
    for process in ranks:
        process.kill()
        process.join()
    assert ended == 0
    seconds, _, message = (tmp_path / "said").read_text().partition(" ")
    # `--ddp_timeout 3` is kept; a killed one is noticed long before its 600 seconds
    assert float(seconds) < 60 and (end == "is killed" or float(seconds) > 2)
    assert "\n" not in message and "checkpoint-12 is the last checkpoint" in message
    assert "--resume_from_checkpoint latest" in message
