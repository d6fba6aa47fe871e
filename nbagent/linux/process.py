"""What a process may do and who it is: prctl(2), capabilities, ids, resource limits, descriptors."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
from typing import Iterable

from nbagent.linux.libc import call

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
_LINUX_CAPABILITY_VERSION_3 = 0x20080522


def prctl(option: int, *arguments: int) -> int:
    """prctl(2). Raises OSError."""
    padded = (*arguments, 0, 0, 0, 0)[:4]
    return call("prctl", option, *(ctypes.c_ulong(argument) for argument in padded))


def last_capability() -> int:
    """The highest capability this kernel knows."""
    with open("/proc/sys/kernel/cap_last_cap") as file:
        return int(file.read())


def drop_bounding_set(capabilities: Iterable[int]) -> None:
    """Makes these capabilities unobtainable for this process and its children."""
    for capability in capabilities:
        prctl(PR_CAPBSET_DROP, capability)


def keep_capabilities(kept: Iterable[int], last: int) -> None:
    """Leaves the caller, root of its user namespace, these capabilities alone, by exec too."""
    kept = frozenset(kept)
    for capability in range(last + 1):
        if capability not in kept:
            prctl(PR_CAPBSET_DROP, capability)
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()
    for capability in kept:
        for kind in (0, 1):
            sets[3 * (capability // 32) + kind] |= 1 << capability % 32
    call("capset", header, sets)


def become(uid: int) -> None:
    """Takes user and group id `uid` for good; the kernel clears all capabilities with it."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def raise_permitted() -> None:
    """Puts all permitted capabilities into effect again, as after a change of the effective user id.

    By capset(2), version 3: for each 32 of them the effective, the permitted and the inheritable.
    """
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()
    call("capget", header, sets)
    sets[0], sets[3] = sets[1], sets[4]
    call("capset", header, sets)


def limit(kind: int, soft: int, hard: int) -> None:
    """setrlimit(2), never above the hard limit there is."""
    _, ceiling = resource.getrlimit(kind)
    if ceiling != resource.RLIM_INFINITY:
        hard = min(hard, ceiling)
    resource.setrlimit(kind, (min(soft, hard), hard))


def make_room_for_descriptors(count: int) -> None:
    """Makes the table of descriptors large enough for so many, or as many as there may be, before there are threads.

    It begins with 64. Who has threads when it grows waits for an RCU grace period, 5 to 25 ms (expand_fdtable of
    the kernel's fs/file.c).
    """
    highest = min(count, resource.getrlimit(resource.RLIMIT_NOFILE)[0]) - 1
    os.close(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, highest))
