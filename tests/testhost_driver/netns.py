# SPDX-License-Identifier: BSD-3-Clause
"""A network namespace per host, named so that `ip netns exec testhost-NAME` works by hand.

Only loopback is inside. The driver reaches a host's ports by connecting from within this namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import threading
from pathlib import Path

from testhost_driver import state
from testhost_driver.errors import HostError

CLONE_NEWNET = 0x40000000
DIRECTORY = Path("/run/netns")


def name_of(host: str) -> str:
    return f"testhost-{host}"


def path_of(host: str) -> Path:
    return DIRECTORY / name_of(host)


def create(host: str) -> None:
    with state.locked(state.directory() / "locks" / ".netns"):
        if not DIRECTORY.exists():
            # iproute2 makes this directory a mount point at its first use and never unmounts it.
            (state.directory() / "netns-is-ours").touch()
        ip("netns", "add", name_of(host))
        ip("-n", name_of(host), "link", "set", "lo", "up")


def remove(host: str) -> None:
    with state.locked(state.directory() / "locks" / ".netns"):
        if path_of(host).exists():
            ip("netns", "del", name_of(host))
        ours = state.directory() / "netns-is-ours"
        if ours.exists() and not (DIRECTORY.exists() and any(DIRECTORY.iterdir())):
            subprocess.run(["umount", DIRECTORY], check=False, capture_output=True)
            with contextlib.suppress(OSError):
                DIRECTORY.rmdir()
            ours.unlink()


def enter(path: str | Path) -> None:
    """Move the calling thread, and only it, into the namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, CLONE_NEWNET) != 0:
            errno = ctypes.get_errno()
            raise OSError(errno, os.strerror(errno), str(path))
    finally:
        os.close(fd)


def connect(
    host: str, port: int, timeout_s: float, address: str = "127.0.0.1", source: str = ""
) -> socket.socket:
    """A TCP connection made inside the namespace, from the address `source` if one is given.

    A socket belongs to the namespace in which it was created, whichever process uses it. A thread enters the
    namespace, creates the socket and ends, so that no other code runs there.
    """
    result: list[socket.socket | BaseException] = []

    def make() -> None:
        try:
            enter(path_of(host))
            bound = (source, 0) if source else None
            result.append(socket.create_connection((address, port), timeout=timeout_s, source_address=bound))
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=make, name=f"connect-{host}-{port}")
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    result[0].settimeout(None)
    return result[0]


def ip(*arguments: str) -> str:
    """The output of `ip ARGUMENTS`. Raises HostError."""
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise HostError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
