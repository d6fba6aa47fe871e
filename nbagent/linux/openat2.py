"""openat2(2): opens what is below a directory, and fails where a symbolic link leads out of it."""

from __future__ import annotations

import ctypes
import os
import struct

from nbagent.linux.libc import call

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_BENEATH = 0x08

# The same number on every architecture, as all since Linux 5.1.
_NR_OPENAT2 = 437
_HOW = struct.Struct("=QQQ")


def open_beneath(directory_fd: int, path: str, flags: int) -> int:
    """A descriptor of `path`, which is relative to the directory. Raises OSError, EXDEV when it leads out of it."""
    how = _HOW.pack(flags | os.O_CLOEXEC, 0, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS)
    size = ctypes.c_size_t(_HOW.size)
    return call("syscall", ctypes.c_long(_NR_OPENAT2), ctypes.c_int(directory_fd), os.fsencode(path), how, size)
