"""What the C library does with the memory that tensors on a CPU give back."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt: bytes at the end of the heap from which on they are given back, and bytes of a piece from
which on it is a mapping of its own."""


def keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors on a CPU give back; where there is another C library nothing happens.

    It returns large pieces to the system at once, and every page that is taken anew is a fault and must be zeroed:
    a fifth of a step's time (docs/log.md). The process keeps its largest size until it ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Some versions take no threshold above 32 MiB.
        _ = mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
