# SPDX-License-Identifier: Apache-2.0
"""Memory of a training on the CPU: what a step frees, the next one uses again."""

import ctypes
import platform


# of mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for this process, from now to its end; whether it does.

    Every step allocates the same large tensors. glibc maps each one that is larger than 32 MiB into the process, page
    by page as it is first written, and out again when it is freed, which costs a step with 65,536 prototypes nearly a
    tenth of its time. Kept, the memory is the heap's. No effect with another C library, nor on a GPU, where torch
    has an allocator of its own.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
