# SPDX-License-Identifier: BSD-3-Clause
"""One cgroup per host in every hierarchy, below the one the driver is in and never above it.

`testhost-NAME/host` holds the host, `testhost-NAME/helpers` the forwarders and tunnels that serve it, so that
a host sees none of them and `down` finds every process by membership. Where all of cgroups are v2 this is one
directory; on a v1 or hybrid machine it is one per controller.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from testhost_driver import processes
from testhost_driver.errors import HostError
from testhost_driver.state import Process

MOUNT = Path("/sys/fs/cgroup")


def is_unified() -> bool:
    return (MOUNT / "cgroup.controllers").exists()


def hierarchies() -> dict[Path, Path]:
    """Mount point of each hierarchy, and the directory in it that this process is in."""
    found = {}
    with open("/proc/self/cgroup") as lines:
        memberships = [line.rstrip("\n").split(":", 2) for line in lines]
    for _number, controllers, path in memberships:
        if not controllers:
            mount = MOUNT if is_unified() else MOUNT / "unified"
        else:
            mount = MOUNT / controllers.removeprefix("name=")
        if mount.is_dir():
            found[mount] = mount / path.lstrip("/")
    return found


def create(host: str, memory_bytes: int | None, cpus: int | None) -> None:
    """Make the host's directories, with the limits of the whole host where some are asked for."""
    for mount, parent in hierarchies().items():
        if is_unified():
            parent = _delegated_parent(parent)
        for directory in (
            parent / f"testhost-{host}",
            *(parent / f"testhost-{host}" / x for x in ("host", "helpers")),
        ):
            directory.mkdir(exist_ok=True)
            if mount.name == "cpuset":
                # A new v1 cpuset has no processor, and no process can join it before it has one.
                for name in ("cpuset.cpus", "cpuset.mems"):
                    (directory / name).write_text((directory.parent / name).read_text())
        top = parent / f"testhost-{host}"
        if is_unified():
            _enable_controllers(top)
            _limit(top / "host/memory.max", memory_bytes)
            _limit(top / "host/cpu.max", f"{cpus * 100_000} 100000" if cpus else None)
        elif mount.name == "memory":
            _limit(top / "host/memory.limit_in_bytes", memory_bytes)
        elif mount.name == "cpu":
            _limit(top / "host/cpu.cfs_quota_us", cpus * 100_000 if cpus else None)


def find(host: str) -> list[Path]:
    """Every `testhost-NAME` directory on the machine, below whichever cgroup the `up` that made it ran in."""
    found: list[Path] = []
    mounts = [MOUNT] if is_unified() else list(hierarchies())
    for mount in mounts:
        for directory, children, _files in os.walk(mount):
            if f"testhost-{host}" in children:
                found.append(Path(directory) / f"testhost-{host}")
            # A host has hundreds of cgroups of its own, and none of the driver's is among them.
            children[:] = [child for child in children if not child.startswith("testhost-")]
    return found


def join_files(host: str, part: str) -> list[str]:
    """The `cgroup.procs` that a process of `part` (host, helpers) writes itself into."""
    return [str(top / part / "cgroup.procs") for top in find(host)]


def exec_files(leader: Process) -> list[str]:
    """Where a command that enters the host belongs: in the host's delegated `testhost-exec.service`."""
    files = []
    with open(f"/proc/{leader.pid}/cgroup") as lines:
        memberships = [line.rstrip("\n").split(":", 2) for line in lines]
    for _number, controllers, path in memberships:
        mount = MOUNT / controllers.removeprefix("name=")
        if not controllers and not is_unified():
            mount = MOUNT / "unified"
        root = mount / path.lstrip("/").removesuffix("init.scope")
        service = root / "system.slice/testhost-exec.service"
        chosen = service if service.is_dir() else root
        if (chosen / "cgroup.procs").exists():
            files.append(str(chosen / "cgroup.procs"))
    return files


def members(host: str) -> set[int]:
    pids: set[int] = set()
    for top in find(host):
        for directory, _children, _files in os.walk(top):
            with contextlib.suppress(OSError):
                pids.update(int(line) for line in (Path(directory) / "cgroup.procs").read_text().split())
    pids.discard(0)
    return pids


def kill(host: str, timeout_s: float = 20) -> None:
    """End every process that is in the host's cgroups, and wait for it."""
    deadline = time.monotonic() + timeout_s
    while pids := members(host):
        if time.monotonic() > deadline:
            raise HostError(f"{host}: processes {sorted(pids)} do not end")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(pid)
                try:
                    # The pid was read before the pidfd was opened and may have been reused since: only a process
                    # that is in the host's cgroup while the pidfd is held belongs to the host.
                    if _is_member(host, pid):
                        signal.pidfd_send_signal(fd, signal.SIGKILL)
                        processes.wait_gone(fd, min(deadline, time.monotonic() + 5))
                finally:
                    os.close(fd)


def remove(host: str) -> None:
    """Remove the directories, deepest first. A cgroup stays busy (EBUSY) for a moment after its last process."""
    deadline = time.monotonic() + 5
    for top in find(host):
        while top.exists():
            error: OSError | None = None
            for directory, _children, _files in os.walk(top, topdown=False):
                try:
                    os.rmdir(directory)
                except FileNotFoundError:
                    pass
                except OSError as caught:
                    error = caught
            if error and time.monotonic() > deadline:
                raise HostError(f"{host}: cannot remove cgroup: {error}")
            if error:
                time.sleep(0.02)


def _is_member(host: str, pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return f"/testhost-{host}/" in text


def _limit(path: Path, value: int | str | None) -> None:
    if value is not None:
        path.write_text(str(value))


def _delegated_parent(own: Path) -> Path:
    """The host cgroup's parent: beside this process on v2, since a cgroup with processes delegates no controller."""
    return own if own == MOUNT else own.parent


def _enable_controllers(top: Path) -> None:
    for directory in (top.parent, top):
        wanted = (directory / "cgroup.controllers").read_text().split()
        with contextlib.suppress(OSError):
            (directory / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in wanted))
