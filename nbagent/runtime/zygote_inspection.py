# SPDX-License-Identifier: BSD-3-Clause
"""Inspection of a zygote from outside, by the kernel's facts about it.

A zygote runs the code of an image, so a hostile one may report anything. The zygote service therefore accepts a fork
only when the kernel confirms who forked it and where, and looks at the zygote between requests: one thread, the
descriptors that it had when it was ready, no other process in its unit, and hardly any processor time, because an
honest zygote sleeps until the next request. So a zygote cannot serve a slot itself, or through a process of its own,
outside the slot's limits and after its release: it would keep the slot's socket, a connection or a process.

Memory that a zygote shares with the slots it forked cannot be seen here; an image's zygote and its slots are one party
(packaging/docs/security.md), and the unit's limits are those of a slot.

Standard library only, and little of it, because every init of a slot inherits it; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import Dict, Optional, Tuple

from nbagent.wire.fields import MalformedMessage

# A request is answered while the zygote still closes its copies of the slot's descriptors. On a busy host it may wait
# seconds for a processor, as a fork does. An honest zygote that sleeps has closed them.
SETTLE_S = 0.2
KEPT_MAX_S, KEPT_ASLEEP_S = 5.0, 0.5
LOOK_AGAIN_S = 1.0
INTERVAL_S = 10.0
# A fork of a slot is in the zygote's unit until the supervisor has moved it, which takes milliseconds; the supervisor
# gives up after slots.start_timeout, 60 s by default.
UNPLACED_MAX_S = 60.0
# Processor time that a zygote may have used since it was ready: a fork takes 3 to 10 ms, and with three times slower
# processors 30 ms.
CPU_FIRST_S, CPU_FORK_S, CPU_PER_S = 5.0, 0.2, 0.02
# The link of a descriptor, the device and the inode.
_File = Tuple[str, int, int]
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_CGROUP_ROOTS = ("/sys/fs/cgroup/systemd", "/sys/fs/cgroup")


class Inspection:
    """The kernel's facts about the zygote `pid`, compared with those of the time when this object was made.

    The constructor raises OSError.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptors = _descriptors(pid)
        self._cgroup = _unit_cgroup()
        self._processes = {os.getpid(), pid}
        self._unplaced: Dict[int, float] = {}
        # The files that it did not have when it was ready, with the time at which each was seen first.
        self._kept: Dict[_File, float] = {}
        self._ready_s = time.monotonic()
        self._cpu_s = _cpu_s(pid)

    def find(self, forks: int) -> Optional[str]:
        """The fault of the zygote as text, None if there is none; `forks` is the number of its forks so far."""
        try:
            return self._find(forks)
        except (FileNotFoundError, ProcessLookupError):
            return None  # the zygote has ended
        except PermissionError:
            # As for a process that is not dumpable. `serve` reaps a zygote that has ended, and reports how.
            if not _has_ended(self.pid):
                raise
            return None
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise
            return None  # not known now, because the host has no open file left

    def _find(self, forks: int) -> Optional[str]:
        now_s = time.monotonic()
        if (threads := len(os.listdir(f"/proc/{self.pid}/task"))) != 1:
            return f"it runs {threads} threads, where a fork copies one"
        slept = _sleep(self.pid)
        added = {file: name for name, file in _descriptors(self.pid).items() if self._descriptors.get(name) != file}
        # By file, because the next request's descriptors have the same numbers.
        self._kept = {file: self._kept.get(file, now_s) for file in added}
        # Asleep all the while that its descriptors were read.
        allowed_s = KEPT_ASLEEP_S if slept is not None and slept == _sleep(self.pid) else KEPT_MAX_S
        kept = [added[file] for file, since_s in self._kept.items() if now_s - since_s > allowed_s]
        if kept:
            return f"it keeps descriptors that it did not have when it was ready: {', '.join(kept)}"
        allowed_s = CPU_FIRST_S + CPU_FORK_S * forks + CPU_PER_S * (now_s - self._ready_s)
        if (used_s := _cpu_s(self.pid) - self._cpu_s) > allowed_s:
            return f"it used {used_s:.0f} s of processor time for {forks} slots"
        with open(f"{self._cgroup}/cgroup.procs") as file:
            present = {int(line) for line in file} - self._processes
        self._unplaced = {pid: self._unplaced.get(pid, now_s) for pid in present}
        over = [pid for pid, since_s in self._unplaced.items() if now_s - since_s > UNPLACED_MAX_S]
        if over:
            return f"it has processes of its own: {', '.join(map(str, sorted(over)))}"
        return None

    @property
    def again_s(self) -> float:
        """The time until the next inspection, in seconds."""
        return LOOK_AGAIN_S if self._kept else INTERVAL_S


class Sleep:
    """How long a process has slept without a break."""

    def __init__(self, pid: int) -> None:
        self._pid, self._number, self._since_s = pid, None, 0.0  # type: int, Optional[int], float

    def lasts_s(self) -> float:
        """The time since the call of this method that has seen the process in its present sleep first."""
        now_s, before = time.monotonic(), self._number
        try:
            self._number = _sleep(self._pid)
        except OSError:  # it has ended
            self._number = None
        if self._number is None or self._number != before:
            self._since_s = now_s
        return now_s - self._since_s


def check_fork(pidfd: int, parent: int, pidns_fd: int) -> None:
    """Checks that `pidfd` is of a child of the process `parent` in the pid namespace `pidns_fd`.

    Raises MalformedMessage when it is not, and ProcessLookupError when the process has ended.
    """
    pid = _pid(pidfd)
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The fields after the name, which is in parentheses: the state and the parent (proc_pid_stat(5)).
            ppid = int(file.read().rpartition(b")")[2].split()[1])
        namespace = os.stat(f"/proc/{pid}/ns/pid")
    except (FileNotFoundError, ProcessLookupError):
        raise _ended() from None
    # The process of the pidfd runs, so that its pid was not reused in between.
    _pid(pidfd)
    if ppid != parent or not os.path.samestat(namespace, os.fstat(pidns_fd)):
        raise MalformedMessage(f"process {pid} is not a child of the zygote in the slot's pid namespace")


def _pid(pidfd: int) -> int:
    with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
        for line in file:
            if line.startswith(b"Pid:"):
                if (pid := int(line[4:])) > 0:
                    return pid
                raise _ended()
    raise MalformedMessage("the descriptor of a forked process is not a pidfd")


def _ended() -> ProcessLookupError:
    return ProcessLookupError(errno.ESRCH, "the slot's program exited before it was in its scope")


def _descriptors(pid: int) -> Dict[str, _File]:
    """The open files of a process by descriptor: the link, such as socket:[4711], and the inode, because the links of
    memfds of one name are equal."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            path = f"/proc/{pid}/fd/{name}"
            status = os.stat(path)
            found[name] = (os.readlink(path), status.st_dev, status.st_ino)
    return found


def _sleep(pid: int) -> Optional[int]:
    """The number of a process's sleep, None while it runs or waits for a processor or a lock of the kernel."""
    with open(f"/proc/{pid}/status", "rb") as file:
        fields = dict(line.split(b":", 1) for line in file)
    is_asleep = fields[b"State"].split()[0] == b"S"
    return int(fields[b"voluntary_ctxt_switches"]) if is_asleep else None


def _has_ended(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"X", b"Z")
    except (FileNotFoundError, ProcessLookupError):
        return True


def _cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _unit_cgroup() -> str:
    """The cgroup directory of this process, which is that of its unit."""
    with open("/proc/self/cgroup") as file:
        lines = [line.rstrip("\n").split(":", 2) for line in file]
    # On a host with cgroup v1 systemd's own hierarchy is listed before the unified one.
    path = next(path for _, controllers, path in lines if controllers in ("name=systemd", ""))
    for root in _CGROUP_ROOTS:
        if os.path.exists(f"{root}{path}/cgroup.procs"):
            return root + path
    raise FileNotFoundError(errno.ENOENT, "no cgroup.procs", path)
