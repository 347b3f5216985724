"""What the C library does with the memory that tensors on a CPU give back."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt: bytes at the end of the heap from which on they go back to the system, and bytes of a
piece from which on it is a mapping of its own, which goes back when it is freed."""

USUAL = {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26}
"""What glibc comes to by itself where large pieces are freed."""


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let glibc keep in the block what tensors give back; where there is another C library nothing happens.

    Every page that is taken anew from the system is a fault and must be zeroed: a fifth of a training step
    (docs/log.md). Within the block the process keeps its largest size. Of aligned pieces of one size, as tensors are,
    glibc uses none again before there are seven: where few sizes are in use, a process may be larger than without.
    """
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None:
        yield
        return
    # Some versions take no threshold above 32 MiB.
    _ = mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        for option, value in USUAL.items():
            mallopt(option, value)
        libc.malloc_trim(0)
