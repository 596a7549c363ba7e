# SPDX-License-Identifier: Apache-2.0
"""`hf-simprune analyze`."""

from pathlib import Path

from ..rba.arguments import ANALYZE_OPTIONS, AnalyzeArguments, validate_analysis


OPTIONS = ANALYZE_OPTIONS


def run(args: AnalyzeArguments) -> Path:
    """Measure; returns the file of the record."""
    validate_analysis(args)
    from ..rba.output import REPORT
    from ..rba.run import run_analyze

    run_analyze(args)
    return Path(args.output_dir) / REPORT
