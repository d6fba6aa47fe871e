# SPDX-License-Identifier: BSD-3-Clause
"""Processes by identity: known by pid and start time, ended and awaited by pidfd, never found by name."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable

from testhost_driver.entry import start_ticks
from testhost_driver.state import Process


def identify(pid: int) -> Process | None:
    ticks = start_ticks(pid)
    return None if ticks is None else Process(pid, ticks)


def alive(process: Process | None) -> bool:
    return process is not None and start_ticks(process.pid) == process.start_ticks


def open_pidfd(process: Process) -> int | None:
    """A pidfd of that process, or None when it has ended."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    if alive(process):  # checked after the pidfd is open, because from then on the pid cannot be reused
        return fd
    os.close(fd)
    return None


def wait_gone(fd: int, deadline: float) -> bool:
    """Wait until the process behind a pidfd has ended, at most until `deadline` (monotonic seconds)."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0, (deadline - time.monotonic()) * 1000)))


def kill(processes: Iterable[Process | None], timeout_s: float = 10) -> None:
    """End the processes with SIGKILL and wait for their end. A process that has ended already is no error."""
    deadline = time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack:
        fds = []
        for process in processes:
            fd = open_pidfd(process) if process else None
            if fd is not None:
                stack.callback(os.close, fd)
                fds.append(fd)
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
        for fd in fds:
            wait_gone(fd, deadline)
