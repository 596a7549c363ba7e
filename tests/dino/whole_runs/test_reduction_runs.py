"""Whole runs with token reduction other than SimPrune's: files, pictures, options, resumption."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hf_simprune.dino.argument_parsing import parse_arguments
from hf_simprune.dino.run import run_training
from hf_simprune.errors import InputError

from ...tiny_run import metrics, words


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tome", "schedule=every_layer,r=1"),
        ("self_slimmed", None),
        ("patch_slimming", None),
        ("simprune_dynamic", None),
    ],
)
def test_a_run_leaves_its_maps_and_pictures(images, tmp_path, name, options):
    folder = tmp_path / "run"
    choice = {"token_reduction": name, "reduction_options": options, "max_steps": 3, "save_steps": 3}
    run_training(parse_arguments(words(output_dir=folder, dataset_name_or_path=images, **choice)))
    assert json.loads((folder / "training" / "run.json").read_text())["finished"] is True
    stored = load_file(folder / "training" / "pruned_tokens.safetensors")
    stages = 3 if name == "tome" else 2  # of a stage in the last block CLS knows nothing, so that it does not run
    stages = 3 if name == "simprune_dynamic" else stages
    assert stored["end_tokens"].shape == (3, 2, stages, 16)
    for picture in ("pruned_tokens.png", "tokens_by_depth.png"):
        with Image.open(folder / picture) as drawn:
            assert len(drawn.convert("RGB").getcolors(2**24)) > 20
    card = (folder / "README.md").read_text()
    assert f"`{name}` token reduction" in card and "](tokens_by_depth.png)" in card
    assert options is None or options in card
    learned = [
        key for key in load_file(folder / "checkpoint-3" / "teacher.safetensors") if key.startswith("reduction.")
    ]
    assert bool(learned) is (name != "tome")
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in metrics(folder) if "loss" in record)


def test_a_run_is_not_resumed_with_other_reduction_options(train):
    train(token_reduction="evit", max_steps=2)
    with pytest.raises(InputError, match="--reduction_options was None and is now fuse=false"):
        train(token_reduction="evit", max_steps=2, reduction_options="fuse=false", resume_from_checkpoint="latest")
