# SPDX-License-Identifier: Apache-2.0
"""What a run says when one of its processes is gone: the others cannot go on without it."""

from pathlib import Path

import torch.distributed as dist

from ..errors import TrainingError
from .checkpoint import last_checkpoint


class LostProcessError(TrainingError):
    """Another process ended, or did not answer within `--ddp_timeout`. Every process that is left raises it."""

    known_to_one = True  # and the process that would speak may be the lost one


def raise_if_lost(error: RuntimeError, output_dir: Path) -> None:
    """Raise LostProcessError where `error` is that of a collective operation which others did not take part in.

    With NCCL such an operation ends the process from another thread, without any exception.
    """
    # gloo reports by a plain RuntimeError that names its source file
    if not isinstance(error, dist.DistError) and "gloo/" not in str(error):
        return
    saved = last_checkpoint(output_dir)
    kept = f"{saved.name} is the last checkpoint" if saved is not None else "there is no checkpoint yet"
    raise LostProcessError(
        f"another process of this run ended or did not answer ({str(error).splitlines()[0]}); {kept}: end what is "
        "left of the run, then start it again with --resume_from_checkpoint latest"
    ) from error
