# SPDX-License-Identifier: Apache-2.0
"""What a card says of how its run was started."""

import pytest

from hf_simprune.dino.report import command


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
    first = ["train_dino.py", "--seed", "1", "--output_dir", "out"]
    assert command([*first[:3], *resumed, *first[3:]], {}) == command(first, {})
