"""Functions of the C library that Python 3.11 has no name for."""

import ctypes
import os


def call(name: str, *arguments: int | bytes | None) -> None:
    """Call a function that returns 0; OSError when it returns anything else."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
