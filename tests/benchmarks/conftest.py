"""The benchmarks are scripts outside of the package: their modules are found by path, where they are there at all."""

import sys
from pathlib import Path


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

collect_ignore_glob = [] if BENCHMARKS.is_dir() else ["test_*.py"]
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))
