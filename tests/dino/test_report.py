# SPDX-License-Identifier: Apache-2.0
"""What a card says of how its run was started."""

import pytest

from hf_simprune.dino.report import command, limits
from hf_simprune.hub.facts import Licence

from .make_arguments import make_arguments


@pytest.mark.parametrize(
    "resumed",
    [
        ["--resume_from_checkpoint", "latest"],
        ["--resume-from-checkpoint", "latest"],
        ["--resume_from_checkpoint=latest"],
        ["--resume-from-checkpoint=out/checkpoint-3"],
    ],
)
def test_the_command_starts_the_run_from_its_beginning(resumed):
    args = make_arguments()
    first = ["recipes/train_dino.py", "--seed", "1", "--output_dir", "out"]
    found = command([*first[:3], *resumed, *first[3:]], args, {})
    assert found == "python recipes/train_dino.py --seed 1 --output_dir out"


def test_limits_follow_from_the_run():
    told = " ".join(limits(make_arguments(), 51_200, True, Licence("mit")))
    assert "51,200 images" in told and "no head" in told and "center crops" in told and "licence" not in told
    assert "No licence was named" in limits(make_arguments(), 1, False, None)[-1]
    assert "k-NN" not in " ".join(limits(make_arguments(), 1, False, None))
