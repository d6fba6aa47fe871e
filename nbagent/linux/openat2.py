# SPDX-License-Identifier: BSD-3-Clause
"""openat2(2) with RESOLVE_BENEATH: opens a path below a directory and fails when a symbolic link leads out of it."""

from __future__ import annotations

import ctypes
import os
import struct

from nbagent.linux.libc import call

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_BENEATH = 0x08

# System calls added since Linux 5.1 have the same number on every architecture.
_NR_OPENAT2 = 437
_HOW = struct.Struct("=QQQ")


def open_beneath(directory_fd: int, path: str, flags: int) -> int:
    """Opens `path` relative to a directory. Raises OSError, with EXDEV when the path leads out of the directory."""
    how = _HOW.pack(flags | os.O_CLOEXEC, 0, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS)
    size = ctypes.c_size_t(_HOW.size)
    return call("syscall", ctypes.c_long(_NR_OPENAT2), ctypes.c_int(directory_fd), os.fsencode(path), how, size)
