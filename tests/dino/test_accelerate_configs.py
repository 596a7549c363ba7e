"""The files in recipes/accelerate_configs start what they say they start."""

import contextlib
import io
import os
from pathlib import Path
from unittest import mock

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from hf_simprune.dino.sharding import Sharding, chosen_sharding

from .test_ranks_sharded import PLUGIN, configured


FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate_configs"
KINDS = {
    "cpu": (DistributedType.NO, 1, 1),
    "single_gpu": (DistributedType.NO, 1, 1),
    "multi_gpu": (DistributedType.MULTI_GPU, 1, 8),
    "multi_node": (DistributedType.MULTI_GPU, 2, 16),
    "fsdp2": (DistributedType.FSDP, 1, 8),
}


def test_there_is_one_for_every_kind_of_machine():
    assert {path.stem for path in FOLDER.iterdir()} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it_and_its_head_tells_how_to_launch(name):
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.distributed_type, config.num_machines, config.num_processes) == KINDS[name]
    assert config.use_cpu == (name == "cpu")
    head = path.read_text().partition("\ncompute_environment")[0].splitlines()
    assert all(line.startswith("#") for line in head)
    assert f"accelerate launch --config_file recipes/accelerate_configs/{name}.yaml" in "".join(head[:2])
    # the training takes its precision from the command line, or from the file of one GPU
    assert config.mixed_precision == ("bf16" if name == "single_gpu" else "no")


@pytest.mark.parametrize("name", KINDS)
def test_that_it_is_untested_is_said_of_all_that_needs_several_gpus_and_of_nothing_else(name):
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))
    head = path.read_text().partition("\ncompute_environment")[0].splitlines()
    said = [line for line in head if line.startswith("# Untested")]
    if config.num_processes > 1 and not config.use_cpu:
        (line,) = said
        assert "GPUs" in line and ("tested on CPUs over gloo" in " ".join(head) or config.num_machines > 1)
    else:
        assert not any("ntested" in line for line in head)


def test_the_launcher_makes_of_the_fsdp_file_what_the_training_supports():
    """What `accelerate launch` hands to its processes, and accelerate's plugin makes of it there."""
    arguments = launch_command_parser().parse_args(["--config_file", str(FOLDER / "fsdp2.yaml"), "train.py"])
    with contextlib.redirect_stderr(io.StringIO()):
        arguments, _, _ = _validate_launch_command(arguments)
    handed = prepare_multi_gpu_env(arguments)
    with mock.patch.dict(os.environ, {key: value for key, value in handed.items() if key.startswith("FSDP_")}):
        plugin = FullyShardedDataParallelPlugin()
    accelerator = configured(**{name: getattr(plugin, name) for name in PLUGIN})
    assert chosen_sharding(accelerator) == Sharding(None, True)
