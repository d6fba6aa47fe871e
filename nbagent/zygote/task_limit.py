# SPDX-License-Identifier: BSD-3-Clause
"""The processes and threads of a slot, and whether its limit leaves room for another kernel.

At the limit (TasksMax=) a kernel that starts cannot start its threads: libzmq aborts it or Python raises an error, and
Jupyter starts it again and shows it as starting meanwhile. So its start is refused before.

The slot's own pid namespace has all its processes. They are counted there and not read from the cgroup, because a slot
sees no cgroup on a host with cgroup v1.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Iterable

from nbagent.wire import limits_page

# Of an ipykernel that has started: 11, and one more that writes the history.
KERNEL_TASKS = 12
_NUM_THREADS = 17  # in /proc/PID/stat after the name; proc_pid_stat(5)


class NoTasksLeft(Exception):
    """The limit leaves no room for another kernel; the text is for the person."""


def check_room(fd: int, kernels: Iterable[int], starting: int = 0) -> None:
    """Raises NoTasksLeft if another kernel would reach the limit on the page of limits `fd`.

    `kernels` are the processes of kernels, each of which counts as KERNEL_TASKS at least, because one that was just
    started has not started its threads; `starting` is the number of those that may have no process yet.
    """
    most = _most(fd)
    by_process = tasks()
    reserved = sum(max(0, KERNEL_TASKS - by_process.get(pid, 0)) for pid in kernels) + KERNEL_TASKS * starting
    if most and sum(by_process.values()) + reserved + KERNEL_TASKS > most:
        raise NoTasksLeft(explanation(fd))


def is_cause(error: BaseException) -> bool:
    """Whether an error is that of the limit, of this module or of a system call."""
    no_thread = isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    return no_thread or isinstance(error, NoTasksLeft) or (isinstance(error, OSError) and error.errno == errno.EAGAIN)


def explanation(fd: int) -> str:
    """The reason, with the number that are used."""
    used, most = sum(tasks().values()), _most(fd)
    return (
        f"This notebook server has {used}{f' of at most {most}' if most else ''} processes and threads, so that no"
        f" kernel or terminal can be started: a kernel has {KERNEL_TASKS} or more. Shut down kernels and terminals that"
        " are not in use, and try again."
    )


def tasks(proc: str = "/proc") -> dict[int, int]:
    """The number of threads of each process of the slot."""
    found = {}
    for name in filter(str.isdigit, os.listdir(proc)):
        # A process may end meanwhile. Its name may have blanks and brackets.
        with contextlib.suppress(OSError, IndexError, ValueError), open(f"{proc}/{name}/stat", "rb") as file:
            found[int(name)] = int(file.read().rpartition(b")")[2].split()[_NUM_THREADS])
    return found


def _most(fd: int) -> int:
    """The limit; 0 if it is unknown."""
    try:
        limits = limits_page.read(fd)
    except OSError:
        return 0
    return limits.tasks if limits is not None else 0
