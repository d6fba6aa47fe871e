"""The activity page: how a slot says when somebody last did something, without being asked.

A page of memory that a slot's server writes and the supervisor reads; it cannot grow, so a slot
can only lie about itself. Nobody polls: reading a thousand pages wakes no slot.

Layout, little endian: a double, CLOCK_BOOTTIME seconds of the last act of a person or a kernel;
then a uint32, the kernels that are busy. Standard library only: the writer runs under an image's
own Python.
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
    """What a page says: the last act, and how many kernels are busy."""

    last_s: float
    busy: int


def create() -> int:
    """A fresh page as a file descriptor the caller owns; sealed against growing and shrinking."""
    fd = os.memfd_create("nbagent-activity", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def write(fd: int, busy: int) -> None:
    """Notes that something happened now, and how many kernels are busy."""
    now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    os.pwrite(fd, _LAYOUT.pack(now_s, min(busy, 0xFFFFFFFF)), 0)


def read(fd: int, now_s: float) -> Activity:
    """What the page says; an instant that cannot be (NaN, the future) counts as now."""
    last_s, busy = _LAYOUT.unpack(os.pread(fd, _LAYOUT.size, 0))
    return Activity(last_s if last_s <= now_s else now_s, busy)
