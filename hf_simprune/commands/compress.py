# SPDX-License-Identifier: Apache-2.0
"""`hf-simprune compress`."""

from pathlib import Path

from ..rba.arguments import COMPRESS_OPTIONS, CompressArguments, validate_compression


OPTIONS = COMPRESS_OPTIONS


def run(args: CompressArguments) -> Path:
    """Compress; returns the file of the record."""
    validate_compression(args)
    from ..rba.output import RECORD
    from ..rba.run import run_compress

    run_compress(args)
    return Path(args.output_dir) / RECORD
