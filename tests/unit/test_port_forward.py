# SPDX-License-Identifier: BSD-3-Clause
"""The forwarder, between real sockets: bytes, half-closed connections, programs that come late or never."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbagent.runtime import port_forward
from nbagent.wire import activity


class Slot:
    """A forwarder in a process of its own, as in a slot; `port` is where its program has to listen."""

    def __init__(self, directory: Path, timeout_s: float) -> None:
        self.path = str(directory / "http.sock")
        self.page_fd = activity.create()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.path)
            listener.listen(64)
            self.pid = os.fork()
            if self.pid == 0:
                with contextlib.suppress(BaseException):
                    port_forward.serve(listener.fileno(), self.port, self.page_fd, timeout_s)
                os._exit(7)

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(30)
        client.connect(self.path)
        return client

    def listen(self) -> socket.socket:
        program = socket.create_server(("127.0.0.1", self.port))
        program.settimeout(30)
        return program

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.page_fd)


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[Slot]:
    made = Slot(tmp_path, 60)
    yield made
    made.close()


def read_all(connection: socket.socket) -> bytes:
    chunks = []
    while chunk := connection.recv(1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)


def test_a_connection_waits_until_the_program_listens_and_the_bytes_are_not_lost(slot: Slot) -> None:
    with slot.connect() as client:
        client.sendall(b"early")
        time.sleep(0.3)
        with slot.listen() as program, program.accept()[0] as served:
            assert served.recv(100) == b"early"
            served.sendall(b"answer")
            assert client.recv(100) == b"answer"


def test_megabytes_pass_both_ways_at_once_unchanged(slot: Slot) -> None:
    up, down = os.urandom(5_000_000), os.urandom(7_000_000)
    heard = {}
    with slot.listen() as program, slot.connect() as client, program.accept()[0] as served:
        served.settimeout(30)

        def send(side: socket.socket, content: bytes) -> None:
            side.sendall(content)
            side.shutdown(socket.SHUT_WR)

        def receive(name: str, side: socket.socket) -> None:
            heard[name] = hashlib.sha256(read_all(side)).digest()

        work = [threading.Thread(target=send, args=(client, up)), threading.Thread(target=send, args=(served, down)),
                threading.Thread(target=receive, args=("up", served)),
                threading.Thread(target=receive, args=("down", client))]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
    assert heard == {"up": hashlib.sha256(up).digest(), "down": hashlib.sha256(down).digest()}


def test_the_end_of_one_direction_is_forwarded_and_the_other_goes_on(slot: Slot) -> None:
    with slot.listen() as program, slot.connect() as client, program.accept()[0] as served:
        client.sendall(b"all I have to say")
        client.shutdown(socket.SHUT_WR)
        assert read_all(served) == b"all I have to say"
        served.sendall(b"and still an answer")
        served.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"and still an answer"


def test_a_client_that_does_not_read_blocks_the_program_and_costs_little_memory(slot: Slot) -> None:
    with slot.listen() as program, slot.connect() as client, program.accept()[0] as served:
        served.settimeout(1)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 1 << 28:
                sent += served.send(bytes(1 << 20))
        resident = next(line for line in Path(f"/proc/{slot.pid}/status").read_text().splitlines() if "VmRSS" in line)
        assert int(resident.split()[1]) < 200_000, "kilobytes; unread bytes are buffered without a bound"
        served.shutdown(socket.SHUT_WR)
        received = 0
        while chunk := client.recv(1 << 16):
            received += len(chunk)
        assert received >= sent > 0


def test_closed_connections_leave_no_descriptor_and_no_memory(slot: Slot) -> None:
    with slot.listen() as program:
        with slot.connect(), program.accept()[0]:
            pass
        deadline, before = time.monotonic() + 30, 0
        for number in range(100):
            client = slot.connect()
            served = program.accept()[0]
            client.sendall(b"x")
            for side in (client, served) if number % 2 else (served, client):
                side.close()
            if number == 10:
                before = slot.descriptors()
        while slot.descriptors() > before + 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert slot.descriptors() <= before + 2


def test_more_clients_than_it_serves_at_a_time_wait_and_come_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_forward, "CONNECTIONS_MAX", 4)
    slot = Slot(tmp_path, 60)
    try:
        with slot.listen() as program, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(slot.connect()) for _ in range(12)]
            for client in clients:
                client.sendall(b"x")
                client.shutdown(socket.SHUT_WR)
            for _ in clients:
                with program.accept()[0] as served:
                    assert served.recv(10) == b"x"
                    served.sendall(b"y")
            assert [read_all(client) for client in clients] == [b"y"] * 12
    finally:
        slot.close()


def test_a_program_that_stops_listening_is_noticed_by_the_next_client(slot: Slot) -> None:
    with slot.listen() as program, slot.connect(), program.accept()[0]:
        pass
    with slot.connect() as client:
        assert client.recv(10) == b""


def test_the_forwarder_ends_when_the_program_never_listens(tmp_path: Path) -> None:
    slot = Slot(tmp_path, 0.3)
    try:
        with slot.connect() as client:
            assert client.recv(10) == b""
        assert os.waitstatus_to_exitcode(os.waitid(os.P_PID, slot.pid, os.WEXITED | os.WNOWAIT).si_status << 8) == 7
    finally:
        slot.close()


def test_bytes_of_a_client_count_as_activity_and_those_of_the_program_do_not(slot: Slot) -> None:
    def acted_s() -> float:
        return activity.read(slot.page_fd, float("inf")).last_s

    with slot.listen() as program, slot.connect() as client, program.accept()[0] as served:
        served.sendall(b"a poll's answer")
        assert client.recv(100)
        assert acted_s() == 0
        client.sendall(b"x")
        assert served.recv(10)
        assert 0 < acted_s() <= time.clock_gettime(time.CLOCK_BOOTTIME)


@pytest.mark.parametrize(("response", "acts"), [
    ((b"HTTP/1.1 200 OK\r\n", b"\r\n"), True), ((b"HTTP/1.1 101 Switching", b" Protocols"), True),
    ((b"HTTP/1.0 302 Found\r\n",), True), ((b"HT", b"TP/1.1 20", b"4 No Content\r\n"), True),
    ((b"HTTP/1.1 401 Unauthorized\r\n", b"\r\n"), False), ((b"HTTP", b"/1.1 40", b"3 Forbidden\r\n"), False),
    ((b"HTTP/1.0", b" 500 Internal Server Error\r\n"), False), ((b"HTTP/1.", b"1 4", b"04 Not Found\r\n"), False),
])
def test_a_request_that_the_program_refuses_is_no_activity(
    slot: Slot, response: tuple[bytes, ...], acts: bool
) -> None:
    def has_acted() -> bool:
        return activity.read(slot.page_fd, float("inf")).last_s > 0

    with slot.listen() as program, slot.connect() as client, program.accept()[0] as served:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert served.recv(100)
        assert not has_acted()
        for part in response:
            served.sendall(part)
            assert client.recv(100) == part
        assert has_acted() == acts
        os.pwrite(slot.page_fd, bytes(16), 0)
        client.sendall(b"a message of a websocket, or the rest of a body")
        assert served.recv(100)
        assert has_acted() == acts
