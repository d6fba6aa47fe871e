# SPDX-License-Identifier: BSD-3-Clause
"""The reason why a kernel ended, for the person whose cell it executed.

JupyterLab shows only that "the kernel appears to have died". With this the reason is an output of the cell.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import os
import signal
from typing import Optional

# The slot's own cgroup; absent on a host with cgroup v1.
EVENTS_PATH = "/sys/fs/cgroup/memory.events"
FAULTS = ("SIGSEGV", "SIGILL", "SIGFPE", "SIGABRT")


def oom_kills(path: str = EVENTS_PATH) -> Optional[int]:
    """The number of processes of the slot that the OOM killer has ended; None if that cannot be read."""
    try:
        with open(path) as file:
            return {name: int(value) for name, value in map(str.split, file)}.get("oom_kill")
    except (OSError, ValueError):
        return None


def reason(status: Optional[int], oom_kills_before: Optional[int], path: str = EVENTS_PATH) -> Optional[str]:
    """Why a kernel with this exit status, negative for a signal, ended; None if it was not ended by a signal.

    `oom_kills_before` is what `oom_kills` was at the kernel's start.
    """
    if status is None or status >= 0:
        return None
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    begin = f"The kernel was ended by {name}"
    if name == "SIGBUS":
        storage = os.statvfs(os.path.expanduser("~"))
        size_mib, free_mib = (blocks * storage.f_frsize >> 20 for blocks in (storage.f_blocks, storage.f_bavail))
        return (
            f"{begin}: the storage of this notebook had no room for a write to shared memory (/dev/shm) or to a mapped"
            f" file, or a mapped file was truncated. The storage has {size_mib} MiB, of which {free_mib} MiB are free"
            " now. Delete files in the home directory, /tmp, /var/tmp or /dev/shm, or use less shared memory, and run"
            " the cell again."
        )
    if name == "SIGKILL":
        limit_bytes, kills = os.environ.get("MEM_LIMIT", ""), oom_kills(path)
        limit = f" of {int(limit_bytes) >> 20} MiB" if limit_bytes.isdecimal() else ""
        remedy = "Load less data at a time, or end other kernels and terminals, and run the cell again."
        if kills is None or oom_kills_before is None:
            return f"{begin}, probably because this notebook reached its memory limit{limit}. {remedy}"
        if kills > oom_kills_before:
            return f"{begin}, because this notebook reached its memory limit{limit}. {remedy}"
    if name in FAULTS:
        return f"{begin}, which is a fault of the interpreter or of a library that the notebook uses."
    return f"{begin}."
