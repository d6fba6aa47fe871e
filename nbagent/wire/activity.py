# SPDX-License-Identifier: BSD-3-Clause
"""The activity page: shared memory in which a slot's server records the time of the last activity.

The server writes it and the supervisor reads it, so that no slot has to be polled: reading a thousand pages wakes no
process. It cannot grow, and a slot can write false values about itself only.

Layout, little endian: a double, CLOCK_BOOTTIME seconds of the last activity of a person or a kernel; then a uint32, the
number of busy kernels. Standard library only, because the writer runs under an image's own Python.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from typing import NamedTuple

PAGE_BYTES = 4096
_LAYOUT = struct.Struct("<dI")


class Activity(NamedTuple):
    """The content of a page: the time of the last activity, and the number of busy kernels."""

    last_s: float
    busy: int


def create() -> int:
    """The descriptor of a new page, sealed against a change of its size; it is the caller's."""
    fd = os.memfd_create("nbagent-activity", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def write(fd: int, busy: int) -> None:
    """Records activity now, and the number of busy kernels."""
    now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    os.pwrite(fd, _LAYOUT.pack(now_s, min(busy, 0xFFFFFFFF)), 0)


def read(fd: int, now_s: float) -> Activity:
    """The content of the page; a time that is impossible (NaN, the future) counts as now."""
    last_s, busy = _LAYOUT.unpack(os.pread(fd, _LAYOUT.size, 0))
    return Activity(last_s if last_s <= now_s else now_s, busy)
