# SPDX-License-Identifier: BSD-3-Clause
"""Starts a program as a process of a host: joins its cgroups, enters its network namespace, mounts its root,
then executes.

Run as a script with a plan (see `Plan`) as its only argument; prints the pid of the started process
and exits, so that the process outlives the command that started it and is reaped by init. A failure before the
execution is written to the log and to stderr.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
MS_REC = 0x4000
MS_SLAVE = 0x80000
CAP_SYS_RESOURCE = 24


@dataclasses.dataclass(frozen=True)
class Overlay:
    lower: str
    upper: str
    work: str
    target: str


@dataclasses.dataclass(frozen=True)
class Plan:
    argv: list[str]
    log: str
    environment: dict[str, str]
    cgroup_procs: list[str]
    netns: str | None = None
    overlay: Overlay | None = None
    listen_fd: int | None = None  # handed on as the first one of sd_listen_fds(3)


# Limits that would bound the number of slots. The kernel's maximum of open files is fs.nr_open.
LIMITS = {"NOFILE": 1 << 20, "NPROC": -1, "SIGPENDING": -1, "MSGQUEUE": -1, "MEMLOCK": -1}


def attainable_limits() -> dict[str, int]:
    """The highest hard limits that this process may have (-1: none).

    Raising one needs CAP_SYS_RESOURCE. On a machine where root lacks it, the present hard limit is the highest.
    """
    with open("/proc/self/status") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    if effective & (1 << CAP_SYS_RESOURCE):
        return LIMITS
    return {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1] for name in LIMITS}


def launch(plan: Plan) -> int:
    """Start the plan's program as a process of its own and return its pid."""
    argv = [sys.executable, "-IS", __file__, json.dumps(dataclasses.asdict(plan))]
    fds = () if plan.listen_fd is None else (plan.listen_fd,)
    done = subprocess.run(
        argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, pass_fds=fds, text=True
    )
    return int(done.stdout)


def main() -> None:
    raw = json.loads(sys.argv[1])
    raw["overlay"] = Overlay(**raw["overlay"]) if raw["overlay"] else None
    plan = Plan(**raw)
    pid = os.fork()
    if pid:
        print(pid)
        return
    os.setsid()
    log_fd = os.open(plan.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    _become(plan)


def _become(plan: Plan) -> None:
    # A host's PID 1 has the ordinary policy and priority, whatever the process has that starts the host. The kernel
    # refuses to move a process of a real-time policy into a cgroup (EINVAL; RT_GROUP_SCHED), and a program of a slot
    # may change a priority below 0.
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.setpriority(os.PRIO_PROCESS, 0, 0)
    for path in plan.cgroup_procs:
        Path(path).write_text("0")
    if plan.netns:
        fd = os.open(plan.netns, os.O_RDONLY | os.O_CLOEXEC)
        _check(_libc.setns(fd, CLONE_NEWNET), plan.netns)
    if plan.overlay:
        # A mount namespace of the host's own, so that the mount ends with the host in every case. MS_SLAVE and not
        # MS_PRIVATE, because a file system that the machine unmounts later must be unmounted here too.
        _check(_libc.unshare(CLONE_NEWNS), "unshare")
        _mount(None, "/", None, MS_REC | MS_SLAVE, None)
        layers = f"lowerdir={plan.overlay.lower},upperdir={plan.overlay.upper},workdir={plan.overlay.work}"
        _mount("overlay", plan.overlay.target, "overlay", 0, layers)
    for name, limit in attainable_limits().items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    environment = dict(plan.environment)
    if plan.listen_fd is not None:
        if plan.listen_fd != 3:
            os.dup2(plan.listen_fd, 3)
            os.close(plan.listen_fd)
        environment |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
    os.execvpe(plan.argv[0], plan.argv, environment)


_libc = ctypes.CDLL(None, use_errno=True)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _check(_libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]), target)


def _check(result: int, what: str) -> None:
    if result != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno), what)


if __name__ == "__main__":
    main()
