# SPDX-License-Identifier: BSD-3-Clause
"""Attributes of the calling process: prctl(2), capabilities, ids, resource limits, descriptor table, mappings."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import resource
from typing import Any, Iterable, List, Mapping, Sequence

from nbagent.linux.libc import call

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_DROP = 24
PR_SET_MM, PR_SET_MM_MAP = 35, 14
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


# The memory that /proc/self/cmdline and /proc/self/environ show; it must exist as long as the process does.
_shown: List[Any] = []


def set_command_line(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Sets the command line and the environment that /proc and ps(1) show of this process, as execve(2) would.

    PR_SET_MM_MAP (struct prctl_mm_map of linux/prctl.h) takes no capability. Raises OSError, for example when the
    kernel has no CONFIG_CHECKPOINT_RESTORE.
    """
    shown = [b"".join(os.fsencode(word) + b"\0" for word in arguments),
             b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())]
    with open("/proc/self/stat", "rb") as file:
        # The fields from number 3, the state, on (proc_pid_stat(5)).
        stat = [b"", b"", b"", *file.read().rpartition(b")")[2].split()]
    start_code, end_code, start_stack = (int(stat[number]) for number in (26, 27, 28))
    start_data, end_data, start_brk = (int(stat[number]) for number in (45, 46, 47))
    libc = ctypes.CDLL(None)
    libc.sbrk.restype = ctypes.c_void_p
    # The kernel shows anonymous pages only; a zygote's heap is a file.
    memory = mmap.mmap(-1, sum(map(len, shown)), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"".join(shown))
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    middle, end = begin + len(shown[0]), begin + len(shown[0]) + len(shown[1])
    values = (start_code, end_code, start_data, end_data, start_brk, libc.sbrk(0), start_stack)
    # Then the address and size of the auxiliary vector, and the descriptor of the executable: unchanged.
    new = (ctypes.c_uint64 * 13)(*values, begin, middle, middle, end, 0, 0xFFFFFFFF << 32)
    prctl(PR_SET_MM, PR_SET_MM_MAP, ctypes.addressof(new), ctypes.sizeof(new))
    _shown[:] = [memory]


def runs_replaced_files(maps: str = "/proc/self/maps") -> bool:
    """Whether a program or library that a process executes has been replaced or removed, as an upgrade does it.

    False when its mappings cannot be read.
    """
    try:
        with open(maps, "rb") as file:
            lines = [line.split(None, 5) for line in file]
    except OSError:
        return False
    # Address, mode, offset, device, inode and path. Mappings without a file have none of these paths.
    return any(
        b"x" in line[1] and line[5].startswith((b"/usr/", b"/lib")) and line[5].endswith(b" (deleted)\n")
        for line in lines if len(line) == 6
    )
