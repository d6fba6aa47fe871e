# SPDX-License-Identifier: BSD-3-Clause
"""Attempts of a supervisor that is taken over, run under the restrictions of nbagent.service (test_packages).

Prints the name of each attempt that succeeded. Run as root without restrictions, each must succeed.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket

from nbagent.core import paths
from nbagent.core.model import Limits
from nbagent.supervisor.systemd import Systemd
from nbagent.wire.channel import Channel

CLONE_NEWNS, CLONE_NEWUSER, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 0x10000000, 4096, 16384, 1 << 18
SYS_TGKILL = {"x86_64": 234, "aarch64": 131}[os.uname().machine]
LIBC = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    if getattr(LIBC, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def in_child(action):
    """Runs `action` in a child, because it cannot be undone."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError):
            action()
            os._exit(0)
        os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise PermissionError


def connect(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)


def move_into(pid):
    """Moves a process of the host to where it already is, which needs the same right as another cgroup."""
    with open(f"/proc/{pid}/cgroup") as file:
        lines = file.read().splitlines()
    own = next(line for line in lines if line.startswith("0::")).removeprefix("0::")
    for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
        if os.path.exists(f"{root}{own}/cgroup.procs"):
            with open(f"{root}{own}/cgroup.procs", "w") as file:
                file.write(str(pid))
            return
    raise FileNotFoundError(own)


def write(path):
    with open(path) as file:
        before = file.read()
    with open(path, "w") as file:
        file.write(before)


ATTEMPTS = {
    "D-Bus": lambda: connect("/run/dbus/system_bus_socket"),
    "systemd's own socket": lambda: connect("/run/systemd/private"),
    "the host's passwords": lambda: open("/etc/shadow").close(),
    "a signal to PID 1": lambda: os.kill(1, 0),
    "a signal to a thread": lambda: call("syscall", SYS_TGKILL, 1, 1, 0),
    "a signal by pidfd": lambda: signal.pidfd_send_signal(os.pidfd_open(1), 0),
    "memory of PID 1": lambda: open("/proc/1/mem", "rb").close(),
    "a descriptor of PID 1": lambda: os.readlink("/proc/1/fd/0"),
    "the root of PID 1": lambda: os.stat("/proc/1/root/etc/shadow"),
    "a user namespace": lambda: in_child(lambda: call("unshare", CLONE_NEWUSER)),
    "a mount": lambda: in_child(lambda: (
        call("unshare", CLONE_NEWNS),
        # Otherwise the mount would be made in the host's namespace too, where it succeeds.
        call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None),
        call("mount", b"/etc/nbagent", b"/mnt", None, MS_BIND, None),
    )),
    "a network socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).close(),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close(),
    "another owner of a file": lambda: os.chown(paths.RUN / "taken-over", 1, 1),
    "a file of the system": lambda: write("/usr/lib/os-release"),
    "a setting of nbagent": lambda: write("/etc/nbagent/nbagent.toml"),
    "a cgroup": lambda: move_into(os.getpid()),
}

LIMITS = Limits(1 << 30, 100, None, 256)
# The services that have the rights refuse these, to root without restrictions too.
REQUESTS = {
    "a unit of the host": lambda systemd: systemd.start("debug-shell.service"),
    "an end of a unit of the host": lambda systemd: systemd.stop("dbus.service"),
    "a scope of another name": lambda systemd: systemd.start_scope(
        "taken-over.scope", [os.getpid()], "x", LIMITS, runtime_max_s=1, stop_timeout_s=1
    ),
    "a scope around itself": lambda systemd: systemd.start_scope(
        "nbagent-taken-over.scope", [os.getpid()], "x", LIMITS, runtime_max_s=1, stop_timeout_s=1
    ),
}


def launch(request):
    with Channel.unconnected() as channel:
        channel.socket.connect(str(paths.LAUNCH_SOCKET))
        channel.send(request)
        with channel.receive() as response:
            response.raise_failure()


async def requested(request):
    with contextlib.closing(Systemd()) as systemd:
        await request(systemd)


if __name__ == "__main__":
    (paths.RUN / "taken-over").touch()
    for name, attempt in ATTEMPTS.items():
        with contextlib.suppress(OSError):
            attempt()
            print(f"succeeded: {name}", flush=True)
    for name, request in REQUESTS.items():
        with contextlib.suppress(OSError):
            asyncio.run(requested(request))
            print(f"succeeded: {name}", flush=True)
    with contextlib.suppress(Exception):
        launch({"op": "open", "scope": "init.scope", "pid": 1})
        print("succeeded: files of PID 1", flush=True)
    (paths.RUN / "taken-over").unlink()
    print("complete", flush=True)
