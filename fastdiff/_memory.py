"""Memory that a process has freed stays with it."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_memory() -> bool:
    """Ask the C allocator to give no freed memory back to the system; True where it agreed.

    glibc unmaps large blocks, and the top of its heap, when they are freed; a sampling loop frees
    and allocates the same activations at every layer, and the page faults then cost as much as the
    arithmetic. For the whole process and for good: call it in programs that do little else. The
    ``fastdiff`` command and the benchmarks do; importing fastdiff does not. Allocators other than
    glibc's are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
