# SPDX-License-Identifier: BSD-3-Clause
"""The C library by ctypes, for system calls that Python 3.9 to 3.13 lack.

Standard library only, because this also runs under an image's own Python.
"""

from __future__ import annotations

import ctypes
import os
from typing import Union

# Besides Python's types, which ctypes converts: integers of a given size, arrays, and the results of byref().
Argument = Union[
    int, bytes, None, "ctypes._SimpleCData[int]", "ctypes.Array[ctypes.c_uint32]", "ctypes._CArgObject"
]
_libc = ctypes.CDLL(None, use_errno=True)


def call(function: str, *arguments: Argument) -> int:
    """Calls a function of libc. Raises OSError with errno when it returns -1."""
    result = int(getattr(_libc, function)(*arguments))
    if result == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{function}: {os.strerror(errno)}")
    return result
