# SPDX-License-Identifier: BSD-3-Clause
"""Attempts of a service that is taken over, run under the restrictions of its unit (test_packages, test_gateway).

    taken_over.py supervisor
    taken_over.py service SLOT TOKEN PID    the API or the router; the slot with its token, and a process of it
    taken_over.py gateway ADDRESS           the gateway; the address of a host

Prints the name of each attempt that succeeded. Run as root without restrictions, each must succeed.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import urllib.request
from pathlib import Path

from nbagent.core import paths
from nbagent.core.errors import NbagentError
from nbagent.core.model import Limits
from nbagent.wire import operations
from nbagent.wire.channel import Channel
from nbagent.wire.control import ControlClient
from nbagent.wire.operations import SlotArguments

CLONE_NEWNS, CLONE_NEWUSER, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 0x10000000, 4096, 16384, 1 << 18
PTRACE_SEIZE = 0x4206
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


def connect(path, kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_UNIX, kind) as connection:
        connection.connect(str(path))


def connect_tcp(*address):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(address)


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


# Those that need no file of a host which only root could make.
OF_ANY_USER = {
    name: attempt for name, attempt in ATTEMPTS.items()
    if name not in ("another owner of a file", "a cgroup", "a setting of nbagent")
}
GATEWAY_KEY = "/root/live/privkey.pem"


def main_pid(unit):
    # Without systemctl, because a service has no access to D-Bus; by the name of its cgroup.
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"/{unit}\n" in Path(f"/proc/{pid}/cgroup").read_text():
                return int(pid)
    raise ProcessLookupError(unit)


def trace(pid):
    # In a child, whose end detaches it.
    in_child(lambda: call("ptrace", PTRACE_SEIZE, pid, None, None))


def make_file(path):
    path.touch()
    path.unlink()


def find_token(slot, token):
    """Seeks the token of a slot in its record, and in what the supervisor responds to the API."""
    client, found = ControlClient(), []
    with contextlib.suppress(Exception):
        found += [client.call(operation) for operation in (operations.SLOTS, operations.STATS, operations.IMAGES)]
        found.append(client.call(operations.SLOT, SlotArguments(slot)))
        found.append(client.call(operations.UPDATE, operations.UpdateArguments(slot, {}, "192.0.2.1")))
    with contextlib.suppress(OSError):
        found.append((paths.SLOTS / slot / "slot.json").read_text())
    if token not in json.dumps(found):
        raise LookupError


def call_control():
    if not isinstance(ControlClient().call(operations.SLOTS), list):
        raise LookupError


def of_services(slot, token, pid):
    """The attempts of the API and the router, beside ATTEMPTS."""
    return {
        "the token of a slot": lambda: find_token(slot, token),
        "the ids of slots": lambda: os.listdir(paths.SLOTS),
        "the server of a slot": lambda: connect(paths.SLOTS / slot / "http.sock"),
        "a file beside a slot's socket": lambda: make_file(paths.SLOTS / slot / "by-a-service"),
        "memory of a slot": lambda: open(f"/proc/{pid}/mem", "rb").close(),
        "files of a slot": lambda: os.listdir(f"/proc/{pid}/root/home"),
        "a signal to a slot": lambda: os.kill(pid, 0),
        "a trace of a slot": lambda: trace(pid),
        "memory of the supervisor": lambda: open(f"/proc/{main_pid('nbagent.service')}/mem", "rb").close(),
        "an operation of the supervisor": call_control,
        "the units service": lambda: connect(paths.UNITS_SOCKET, socket.SOCK_SEQPACKET),
        "the launch service": lambda: connect(paths.LAUNCH_SOCKET, socket.SOCK_SEQPACKET),
        "the network service": lambda: connect(paths.NETWORK_SOCKET, socket.SOCK_SEQPACKET),
        "the landing page by an address of choice": lambda: connect(paths.LANDING_SOCKET),
        "the supervisor's socket of the router": lambda: connect(paths.ROUTER_CHECK_SOCKET),
        "the control API as a program of the host": lambda: connect_tcp("127.0.0.1", 9000),
        "the token of the control API": lambda: paths.TOKEN.read_bytes(),
        "a credential of the API": lambda: Path("/run/credentials/nbagent-api.service/token").read_bytes(),
        "the names of images": lambda: os.listdir(paths.IMAGES),
        "a file of nbagent": lambda: write(str(paths.ROUTER_CONFIG)),
        "a file in /run/nbagent": lambda: make_file(paths.RUN / "by-a-service"),
        "a setting of nbagent": lambda: write(str(paths.HOST_SETTINGS)),
    }


def ask(address):
    """Requests the list of slots from the control API of a host."""
    with urllib.request.urlopen(f"http://{address}:9000/slots", timeout=5) as response:
        response.read()


def of_gateway(address):
    """The attempts of a gateway, beside ATTEMPTS."""
    return {
        "the private key of a certificate": lambda: Path(GATEWAY_KEY).read_bytes(),
        "a copy of the private key": lambda: next(paths.GATEWAY_RUN.glob("*/*.pem")).read_bytes(),
        "the key of the DNS": lambda: paths.DNS_KEY.read_bytes(),
        "a setting of the gateway": lambda: write(str(paths.GATEWAY_SETTINGS)),
        "the status service": lambda: connect(paths.GATEWAY_STATUS_SOCKET),
        "memory of the status service": lambda: open(
            f"/proc/{main_pid('nbagent-gateway-status.service')}/mem", "rb").close(),
        "the router of a host": lambda: connect_tcp(address, 8000),
        "the control API of a host": lambda: ask(address),
    }


def launch(request):
    with Channel.unconnected() as channel:
        channel.socket.connect(str(paths.LAUNCH_SOCKET))
        channel.send(request)
        with channel.receive() as response:
            response.raise_failure()


async def requested(request):
    # Not on a gateway, which has no supervisor.
    from nbagent.supervisor.systemd import Systemd

    with contextlib.closing(Systemd()) as systemd:
        await request(systemd)


def make(attempts):
    for name, attempt in attempts.items():
        with contextlib.suppress(OSError, LookupError, StopIteration, NbagentError):
            attempt()
            print(f"succeeded: {name}", flush=True)


def make_of_supervisor():
    (paths.RUN / "taken-over").touch()
    make(ATTEMPTS)
    for name, request in REQUESTS.items():
        with contextlib.suppress(OSError):
            asyncio.run(requested(request))
            print(f"succeeded: {name}", flush=True)
    with contextlib.suppress(Exception):
        launch({"op": "open", "scope": "init.scope", "pid": 1})
        print("succeeded: files of PID 1", flush=True)
    (paths.RUN / "taken-over").unlink()


def main():
    match sys.argv[1:]:
        case ["service", slot, token, pid]:
            make(OF_ANY_USER | of_services(slot, token, int(pid)))
        case ["gateway", address]:
            make(OF_ANY_USER | of_gateway(address))
        case _:
            make_of_supervisor()
    print("complete", flush=True)


if __name__ == "__main__":
    main()
