# SPDX-License-Identifier: BSD-3-Clause
"""mount(2), umount2(2) and pivot_root(2)."""

from __future__ import annotations

import ctypes
import os

from nbagent.linux.libc import call

MS_RDONLY = 1 << 0
MS_NOSUID = 1 << 1
MS_NODEV = 1 << 2
MS_NOEXEC = 1 << 3
MS_REMOUNT = 1 << 5
MS_BIND = 1 << 12
MS_MOVE = 1 << 13
MS_REC = 1 << 14
MS_PRIVATE = 1 << 18
MNT_DETACH = 1 << 1

# libc has no wrapper for pivot_root, whose system call number differs between architectures.
_NR_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2). Raises OSError."""
    call(
        "mount",
        None if source is None else os.fsencode(source),
        os.fsencode(target),
        None if kind is None else kind.encode(),
        ctypes.c_ulong(flags),
        None if data is None else data.encode(),
    )


def umount2(target: str, flags: int) -> None:
    """umount2(2). Raises OSError."""
    call("umount2", os.fsencode(target), flags)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2). Raises OSError."""
    number = _NR_PIVOT_ROOT[os.uname().machine]
    call("syscall", ctypes.c_long(number), os.fsencode(new_root), os.fsencode(put_old))
