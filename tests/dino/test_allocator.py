"""Memory that a step frees is there for the next one, without a page fault."""

import platform
import subprocess
import sys

import pytest


PROGRAM = """
import ctypes, resource
{setup}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size = 64 * 2**20
before = None
for turn in range(3):
    place = libc.malloc(size)
    ctypes.memset(place, turn, size)
    libc.free(place)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    new, before = faults - (before or faults), faults
print(new)
"""


def faults_of_the_last_turn(setup: str) -> int:
    result = subprocess.run([sys.executable, "-c", PROGRAM.format(setup=setup)], capture_output=True, check=True)
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_large_memory_is_not_mapped_anew():
    keep = "from hf_simprune.dino.allocator import keep_freed_memory; assert keep_freed_memory()"
    assert faults_of_the_last_turn("") > 20  # more than 16,000 pages, or 32 huge ones
    assert faults_of_the_last_turn(keep) < 10
