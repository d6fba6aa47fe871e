# SPDX-License-Identifier: BSD-3-Clause
"""The relay of `make up`: bytes, ends of a direction, and no delay of small segments."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from testhost_driver import forward

PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def relay(port: int) -> Iterator[tuple[subprocess.Popen[bytes], tuple[str, int]]]:
    """A relay to `port`: its process and its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # As testhost_driver.launch does: the listening socket is descriptor 3.
        program = (
            f"import os; os.dup2({listener.fileno()}, 3); "
            f"os.execv({sys.executable!r}, ['python3', '-IS', {str(forward.RELAY)!r}, '{port}'])"
        )
        process = subprocess.Popen([sys.executable, "-IS", "-c", program], pass_fds=[listener.fileno()])
        try:
            yield process, listener.getsockname()
        finally:
            process.kill()
            process.wait()


def tcp_sockets(pid: int) -> Iterator[socket.socket]:
    """Copies of the connected TCP sockets of a process."""
    pidfd = os.pidfd_open(pid)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                fd = _libc.syscall(PIDFD_GETFD, pidfd, int(name), 0)
                assert fd >= 0, os.strerror(ctypes.get_errno())
                with socket.socket(fileno=fd) as found, contextlib.suppress(OSError):
                    if found.family == socket.AF_INET and found.getpeername():
                        yield found
    finally:
        os.close(pidfd)


@pytest.fixture
def joined() -> Iterator[tuple[subprocess.Popen[bytes], socket.socket, socket.socket]]:
    """A relay, and both ends of a connection through it."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        process, address = stack.enter_context(relay(server.getsockname()[1]))
        client = stack.enter_context(socket.create_connection(address, timeout=60))
        accepted = stack.enter_context(server.accept()[0])
        yield process, client, accepted


def test_small_segments_are_not_delayed_in_either_direction(
    joined: tuple[subprocess.Popen[bytes], socket.socket, socket.socket]
) -> None:
    process, client, accepted = joined
    client.sendall(b"there")
    assert accepted.recv(100) == b"there"
    accepted.sendall(b"and back")
    assert client.recv(100) == b"and back"
    assert [found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for found in tcp_sockets(process.pid)] == [1, 1]


@pytest.mark.parametrize("size", [0, 3 << 20])
def test_the_end_of_a_direction_is_passed_on_and_the_other_stays(
    joined: tuple[subprocess.Popen[bytes], socket.socket, socket.socket], size: int
) -> None:
    _, client, accepted = joined
    client.sendall(bytes(size))
    client.shutdown(socket.SHUT_WR)
    with accepted.makefile("rb") as received:
        assert len(received.read()) == size
    accepted.sendall(b"answer after the end")
    accepted.shutdown(socket.SHUT_RDWR)
    with client.makefile("rb") as answer:
        assert answer.read() == b"answer after the end"


def test_a_port_without_a_server_closes_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free_port = server.getsockname()[1]
    with relay(free_port) as (process, address), socket.create_connection(address, timeout=60) as client:
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
        assert process.poll() is None
