# SPDX-License-Identifier: BSD-3-Clause
"""The nspawn driver: a real systemd as PID 1 at native speed, in namespaces of this machine's kernel.

It proves speed, density, namespaces and networking. On a machine with cgroup v1 it does not prove v2
behaviour (PSI, memory.high, OOMPolicy, cgroup.kill), which the vm driver proves. Debian 13's systemd starts there
too, because in a container it uses the cgroups that it finds.
"""

from __future__ import annotations

import os
import select
import shlex
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from testhost_driver import cgroups, entry, launch, netns, processes
from testhost_driver.errors import BootFailed
from testhost_driver.state import HostState

# Two seconds on an idle machine.
BOOT_TIMEOUT_S = 300

# Runs as the container's PID 1 and executes systemd. nspawn mounts the v1 controllers read-only, so that systemd
# would apply no limit, without an error; the cgroup namespace is rooted in the host's own cgroup, so that writable
# mounts expose no other cgroup. Before systemd starts, because it then needs no daemon-reexec and no service runs
# without its limits. The second proc is unmasked: nspawn masks parts of /proc, and the kernel refuses a fresh
# /proc in a nested user namespace unless an unmasked one is visible. /proc/sys is read-only, because most of it is the
# machine's; /proc/sys/user is that of the writer's user namespace. systemd 257 keeps all mounts below /proc in services
# that have a /proc of their own.
INIT = r"""
while read -r _ where kind _; do
    if [ "$kind" = cgroup ]; then mount -o remount,bind,rw "$where"; fi
done < /proc/self/mounts
mkdir -p /run/testhost/proc
mount -t proc proc /run/testhost/proc
mount --bind /run/testhost/proc/sys/user /proc/sys/user
exec /lib/systemd/systemd
"""


def check() -> None:
    """Nothing to do: the driver runs on each machine with root."""


def boot(host: HostState, say: Callable[[str], None]) -> HostState:
    """Start the host's systemd; return when it is ready. The state is saved as soon as there is a pid."""
    for name in ("root", "upper/etc", "work"):
        (host.directory / name).mkdir(parents=True, exist_ok=True)  # a host that boots again has them
    (host.directory / "upper").chmod(0o755)  # it is the host's `/`
    (host.directory / "upper/etc/hostname").write_text(f"{host.name}\n")
    (host.directory / "upper/etc/hosts").write_text(
        f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n::1 localhost\n"
    )
    path = str(host.directory / "notify")
    Path(path).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(path)
        pid = launch.launch(_plan(host, path))
        host = replace(host, monitor=processes.identify(pid))
        host.save()
        host = _wait_ready(host, notify)
    _write_entry(host)
    return host


def _write_entry(host: HostState) -> None:
    """Writes the argv that enters the host. A shell moves itself into the host's cgroups, which is free of races."""
    assert host.leader is not None
    join = "".join(f"echo 0 >{shlex.quote(path)};" for path in cgroups.exec_files(host.leader))
    enter = ["nsenter", f"--target={host.leader.pid}", "-m", "-u", "-i", "-n", "-p", "-C", "--wdns=/root"]
    # SIGKILL of the process outside ends the one inside too; without it a command would outlive its caller's timeout.
    enter += ["setpriv", "--pdeathsig=KILL", "--"]
    prefix = ["/bin/sh", "-c", f'{join} exec "$@"', "testhost-exec", *enter]
    path = str(host.directory / "entry")
    entry.write(path, host.leader.pid, host.leader.start_ticks, prefix, remote_shell=False)


def healthy(host: HostState) -> bool:
    return processes.alive(host.monitor) and processes.alive(host.leader)


def halt(host: HostState, *, now: bool) -> None:
    """Kills the host's PID 1 and thereby its pid namespace; no clean shutdown, because its disk is deleted."""
    del now
    processes.kill([host.leader, host.monitor])


def prepare_port(host: HostState, port: int) -> None:
    """Nothing to do: the host is in its network namespace, where connections to its ports are made."""


def _plan(host: HostState, notify_path: str) -> launch.Plan:
    directory = host.directory
    argv = [
        "systemd-nspawn",
        "--quiet",
        "--register=no",
        "--keep-unit",
        "--capability=all",
        "--notify-ready=yes",
    ]
    argv += [f"--directory={directory / 'root'}", f"--machine={host.name}"]
    argv += [
        f"--network-namespace-path={netns.path_of(host.name)}",
        "--kill-signal=SIGRTMIN+3",
        "--link-journal=no",
    ]
    argv += ["--resolv-conf=off", "--timezone=off", "--console=pipe"]
    # Without these, nspawn sets the limits of a freshly booted machine.
    for name, limit in launch.attainable_limits().items():
        argv.append(f"--rlimit=RLIMIT_{name}={'infinity' if limit < 0 else limit}")
    argv += ["/bin/sh", "-c", INIT]
    environment = {
        "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        "NOTIFY_SOCKET": notify_path,
        "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",  # /proc/sys/net belongs to the host's network namespace
        "SYSTEMD_NSPAWN_TMPFS_TMP": "0",  # /tmp on the disk, as on a server, not in memory
        "SYSTEMD_SECCOMP": "0",  # PID 1 of a server has no filter, so that the effect of a slot's filter is tested
    }
    return launch.Plan(
        argv=argv,
        log=str(directory / "console.log"),
        environment=environment,
        cgroup_procs=cgroups.join_files(host.name, "host"),
        overlay=launch.Overlay(
            host.tree, str(directory / "upper"), str(directory / "work"), str(directory / "root")
        ),
    )


def _wait_ready(host: HostState, notify: socket.socket) -> HostState:
    """Read what nspawn notifies until the host's systemd is ready. Ends early if nspawn does."""
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    monitor_fd = processes.open_pidfd(host.monitor) if host.monitor else None
    if monitor_fd is None:
        raise BootFailed(f"{host.name}: systemd-nspawn ended at once:\n{console_end(host)}")
    try:
        poll = select.poll()
        poll.register(notify, select.POLLIN)
        poll.register(monitor_fd, select.POLLIN)
        while True:
            events = dict(poll.poll(max(0, (deadline - time.monotonic()) * 1000)))
            if notify.fileno() not in events:
                why = "systemd-nspawn ended" if events else f"not ready within {BOOT_TIMEOUT_S} s"
                raise BootFailed(f"{host.name}: {why}:\n{console_end(host)}")
            message: Mapping[str, str] = dict(
                line.split("=", 1) for line in notify.recv(4096).decode().splitlines() if "=" in line
            )
            if "X_NSPAWN_LEADER_PID" in message:
                host = replace(host, leader=processes.identify(int(message["X_NSPAWN_LEADER_PID"])))
                host.save()
            if message.get("READY") == "1" and host.leader:
                return host
    finally:
        os.close(monitor_fd)


def console_end(host: HostState) -> str:
    try:
        return "\n".join((host.directory / "console.log").read_text(errors="replace").splitlines()[-30:])
    except FileNotFoundError:
        return "(no console output)"
