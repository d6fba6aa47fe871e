# SPDX-License-Identifier: BSD-3-Clause
"""Attributes of the calling process: prctl(2), capabilities, ids, resource limits, descriptor table."""

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
    """The highest capability number of this kernel."""
    with open("/proc/sys/kernel/cap_last_cap") as file:
        return int(file.read())


def drop_bounding_set(capabilities: Iterable[int]) -> None:
    """Removes capabilities from the bounding set, so that no execve(2) can grant them again. Raises OSError."""
    for capability in capabilities:
        prctl(PR_CAPBSET_DROP, capability)


def keep_capabilities(kept: Iterable[int], last: int) -> None:
    """Reduces the caller, root of its user namespace, to these capabilities, after execve(2) too. Raises OSError."""
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
    """Sets all user and group ids to `uid`; the kernel clears all capabilities when no id is 0. Raises OSError."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def raise_permitted() -> None:
    """Copies the permitted set to the effective set, which a change of the effective user id from 0 clears.

    capset(2) version 3 takes two structures of 32 capabilities each: effective, permitted, inheritable.
    """
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()
    call("capget", header, sets)
    sets[0], sets[3] = sets[1], sets[4]
    call("capset", header, sets)


def set_rlimit(kind: int, soft: int, hard: int) -> None:
    """setrlimit(2), with both values capped at the present hard limit, which only CAP_SYS_RESOURCE can raise."""
    _, ceiling = resource.getrlimit(kind)
    if ceiling != resource.RLIM_INFINITY:
        hard = min(hard, ceiling)
    resource.setrlimit(kind, (min(soft, hard), hard))


def make_room_for_descriptors(count: int) -> None:
    """Enlarges the descriptor table to `count` entries, or to RLIMIT_NOFILE, while the process has one thread.

    The table starts with 64 entries. When it grows in a process with threads, expand_fdtable() (fs/file.c) waits for
    an RCU grace period, 5 to 25 ms.
    """
    highest = min(count, resource.getrlimit(resource.RLIMIT_NOFILE)[0]) - 1
    os.close(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, highest))
