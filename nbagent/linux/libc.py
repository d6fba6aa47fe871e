"""The C library by ctypes, for the system calls that Python 3.9 to 3.13 lack.

Standard library only: this also runs under an image's own Python.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)


def call(function: str, *arguments: Any) -> int:
    """Calls `function` of libc. Raises OSError with the kernel's errno when it returns -1."""
    result = int(getattr(_libc, function)(*arguments))
    if result == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{function}: {os.strerror(errno)}")
    return result
