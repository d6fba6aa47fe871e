# SPDX-License-Identifier: BSD-3-Clause
"""The HTTP server of the API and the gateway, on real sockets: the resources and the delay that a peer can cause."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from malformed import REQUESTS, status_of
from nbagent.web import server as module
from nbagent.web.server import Lane, Server, Service, network_of
from nbagent.wire.control import CALLER_FD

GET = b"GET /a?b HTTP/1.1\r\nHost: x\r\n\r\n"
BODY_MAX_BYTES = 1 << 20
TIMEOUT_S = 20


class Running:
    """A server with a listener for strangers and one for trusted callers, whose loop runs in a thread."""

    def __init__(self, app: Callable[..., Any], **lane: Any) -> None:
        self.listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        for listener in self.listeners:
            listener.setblocking(False)
        trusted_port = self.listeners[1].getsockname()[1]
        self.trusted = Lane(app, 2)
        self.strangers = Lane(app, 1, **lane)
        self.server = Server(self.listeners, Service(
            lambda local, peer: self.trusted if local[1] == trusted_port else self.strangers,  # type: ignore[index]
            BODY_MAX_BYTES,
        ))
        self.stopping = threading.Event()
        self.loop = threading.Thread(target=self._run)
        self.loop.start()

    def _run(self) -> None:
        while not self.server.is_finished:
            if self.stopping.is_set():
                self.server.stop()
            self.server.turn(0.05)
        self.server.close()

    def connect(self, *, trusted: bool = False) -> socket.socket:
        return socket.create_connection(self.listeners[trusted].getsockname(), TIMEOUT_S)

    def connections(self) -> int:
        return len(self.server._connections)

    def close(self) -> None:
        self.stopping.set()
        self.loop.join(TIMEOUT_S)
        assert not self.loop.is_alive()
        for listener in self.listeners:
            listener.close()


def echo(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Responds with the method, the target and the body of the request."""
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{environ['REQUEST_METHOD']} {environ['RAW_URI']} ".encode(), body]


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    with contextlib.ExitStack() as stack:
        def start(app: Callable[..., Any] = echo, **lane: Any) -> Running:
            running = Running(app, **lane)
            stack.callback(running.close)
            return running

        yield start


def wait(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.01)


def response_of(connection: socket.socket) -> bytes:
    """The next response with a Content-Length."""
    received = b""
    while b"\r\n\r\n" not in received:
        data = connection.recv(1)
        assert data, received
        received += data
    length = int(received.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
    while length:
        data = connection.recv(length)
        received, length = received + data, length - len(data)
    return received


def ask(connection: socket.socket, request: bytes = GET) -> bytes:
    connection.sendall(request)
    return response_of(connection)


def is_served(running: Running) -> bool:
    with running.connect() as connection:
        return ask(connection).endswith(b"GET /a?b ")


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(4096) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("begin", [
    b"", b"G", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n12",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n12",
])
def test_a_request_that_is_not_complete_has_no_thread(serve: Callable[..., Running], begin: bytes) -> None:
    running = serve()  # one thread
    slow = [running.connect() for _ in range(20)]
    for connection in slow:
        connection.sendall(begin)
    wait(lambda: running.connections() == 20, "20 connections")
    assert is_served(running)
    for connection in slow:
        connection.close()


def test_an_application_can_see_that_its_client_has_left(serve: Callable[..., Running]) -> None:
    begun, left = threading.Event(), threading.Event()

    def slow(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        waiting, caller_fd = select.poll(), CALLER_FD.get()
        assert caller_fd is not None
        waiting.register(caller_fd, select.POLLRDHUP)
        assert not waiting.poll(0)
        begun.set()
        if waiting.poll(TIMEOUT_S * 1000):
            left.set()
        return echo(environ, start_response)

    running = serve(slow)
    with running.connect() as connection:
        connection.sendall(GET)
        assert begun.wait(TIMEOUT_S) and not left.is_set()
    assert left.wait(TIMEOUT_S)


def test_a_peer_that_does_not_read_has_no_thread(serve: Callable[..., Running]) -> None:
    def much(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [])
        return [bytes(32 << 20 if environ["PATH_INFO"] == "/much" else 1)]

    running = serve(much)
    with running.connect() as lazy, running.connect() as other:
        lazy.sendall(b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n")
        assert lazy.recv(15) == b"HTTP/1.1 200 OK"
        assert ask(other).endswith(b"\r\n\r\n\0")


def test_strangers_do_not_delay_trusted_callers(serve: Callable[..., Running]) -> None:
    may_end = threading.Event()

    def slow(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        if environ["PATH_INFO"] == "/slow":
            may_end.wait(TIMEOUT_S)
        return echo(environ, start_response)

    running = serve(slow)
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(running.connect()) for _ in range(10)]
        for connection in strangers:
            connection.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        wait(lambda: running.connections() == 10, "10 connections")
        trusted = stack.enter_context(running.connect(trusted=True))
        assert ask(trusted).endswith(b"GET /a?b ")
        may_end.set()
        for connection in strangers:
            assert response_of(connection).endswith(b"GET /slow ")


def test_a_request_may_be_promoted_to_the_threads_of_another_lane(serve: Callable[..., Running]) -> None:
    names = []

    def name(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        names.append(threading.current_thread().name.partition("_")[0])
        return echo(environ, start_response)

    running = serve(name, promote=lambda environ: running.trusted if "HTTP_AUTHORIZATION" in environ else None)
    with running.connect() as connection, running.connect(trusted=True) as trusted:
        ask(trusted)
        ask(connection)
        ask(connection, b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\n\r\n")
    assert names[2] == names[0] != names[1]


def test_an_address_has_a_bound_and_its_oldest_silent_connection_makes_room(serve: Callable[..., Running]) -> None:
    running = serve(address_connections=5)
    held = [running.connect() for _ in range(5)]
    wait(lambda: running.connections() == 5, "5 connections")
    assert ask(held[4]).endswith(b"GET /a?b ")
    with running.connect() as newest:
        assert ask(newest).endswith(b"GET /a?b ")
        assert is_closed(held[0]) and running.connections() == 5
        assert ask(held[1]).endswith(b"GET /a?b ")
    for connection in held:
        connection.close()


def test_an_address_whose_requests_are_all_computed_gets_no_further_connection(serve: Callable[..., Running]) -> None:
    may_end = threading.Event()

    def slow(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        may_end.wait(TIMEOUT_S)
        return echo(environ, start_response)

    running = serve(slow, address_connections=2)
    with running.connect() as first, running.connect() as second:
        first.sendall(GET)
        second.sendall(GET)
        wait(lambda: not any(state.waiting for state in running.server._lanes.values()) and running.connections() == 2,
             "two requests that are computed")
        with running.connect() as third:
            assert is_closed(third)
        may_end.set()
        assert response_of(first).endswith(b"GET /a?b ") and response_of(second).endswith(b"GET /a?b ")


def test_a_lane_has_a_bound(serve: Callable[..., Running]) -> None:
    running = serve(connections=5, address_connections=None)
    held = [running.connect() for _ in range(9)]
    assert is_served(running)
    assert running.connections() <= 5
    for connection in held:
        connection.close()


def test_the_bytes_of_a_lane_have_a_bound(serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LANE_MAX_BYTES", 500_000)
    running = serve()
    held = [running.connect() for _ in range(8)]
    for connection in held:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n" + bytes(100_000))
    assert is_served(running)
    wait(lambda: running.connections() < 8, "a connection that was closed")
    assert sum(state.received_bytes for state in running.server._lanes.values()) <= 500_000
    for connection in held:
        connection.close()


@pytest.mark.parametrize("begin", [
    b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n",
])
def test_a_whole_request_has_a_deadline(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, begin: bytes
) -> None:
    monkeypatch.setattr(module, "HEAD_TIMEOUT_S", 0.5)
    monkeypatch.setattr(module, "REQUEST_TIMEOUT_S", 1.0)
    running = serve()
    with running.connect() as connection:
        connection.sendall(begin)
        connection.settimeout(0.05)
        received, deadline_s = b"", time.monotonic() + TIMEOUT_S
        while not received:
            assert time.monotonic() < deadline_s
            with contextlib.suppress(TimeoutError):
                received = connection.recv(4096)
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"a")
        assert received.startswith(b"HTTP/1.1 408 ") and b"urn:nbagent:problem:" in received
    wait(lambda: not running.connections(), "no connection")


def test_a_silent_connection_has_a_deadline(serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD_TIMEOUT_S", 0.3)
    running = serve()
    with running.connect() as connection:
        assert connection.recv(1) == b""


def test_requests_of_one_connection_are_served_in_order(serve: Callable[..., Running]) -> None:
    running = serve()
    with running.connect() as connection:
        connection.sendall(
            GET + b"POST /two HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
            b"POST /three HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\nde\r\n1\r\nf\r\n0\r\n\r\nGET /fo"
        )
        assert response_of(connection).endswith(b"GET /a?b ")
        assert response_of(connection).endswith(b"POST /two abc")
        assert response_of(connection).endswith(b"POST /three def")
        connection.sendall(b"ur HTTP/1.0\r\n\r\n")
        assert response_of(connection).endswith(b"GET /four ")
        assert connection.recv(1) == b""


def test_a_client_that_waits_for_100_continue_gets_it(serve: Callable[..., Running]) -> None:
    running = serve()
    with running.connect() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 100 ")
        assert ask(connection, b"ab").endswith(b"POST / ab")


def test_a_body_above_the_limit_is_refused_and_the_response_arrives(serve: Callable[..., Running]) -> None:
    running = serve()
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    for body in (b"Content-Length: 9000000\r\n\r\n" + bytes(9_000_000),
                 b"Transfer-Encoding: chunked\r\n\r\n" + 40 * chunk + b"0\r\n\r\n"):
        with running.connect() as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n" + body)
            connection.shutdown(socket.SHUT_WR)
            assert b" 413 " in response_of(connection)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_malformed_request_is_refused(serve: Callable[..., Running], name: str) -> None:
    running = serve(lambda environ, start_response: start_response("405 METHOD NOT ALLOWED", []) and [])
    status = status_of(running.connect(), REQUESTS[name])
    assert status is None or 400 <= status < 500 or status in (501, 505), status


def test_headers_with_underscores_and_absolute_targets(serve: Callable[..., Running]) -> None:
    seen = {}

    def note(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        seen.update(environ)
        return echo(environ, start_response)

    running = serve(note)
    with running.connect() as connection:
        ask(connection, b"GET http://evil.example/%41/..?q HTTP/1.1\r\nHost: x\r\nX_Real_IP: 1\r\nSCRIPT_NAME: /x\r\n"
                        b"X-Two: 1\r\nX-Two: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n")
    assert (seen["PATH_INFO"], seen["QUERY_STRING"], seen["HTTP_HOST"]) == ("/A/..", "q", "x")
    assert seen["HTTP_X_TWO"] == "1,2"
    assert seen["CONTENT_LENGTH"] == "2" and seen["SCRIPT_NAME"] == ""
    assert not {"HTTP_X_REAL_IP", "HTTP_SCRIPT_NAME", "HTTP_TRANSFER_ENCODING"} & set(seen)


@pytest.mark.parametrize(("target", "path", "query"), [
    ("/claim?archive=http://127.0.0.1:8123/ok/way&path=lab", "/claim", "archive=http://127.0.0.1:8123/ok/way&path=lab"),
    ("/user/http://other.example/x", "/user/http://other.example/x", ""),
    ("http://host.example/claim?archive=https://a.example/b", "/claim", "archive=https://a.example/b"),
    ("http://host.example", "/", ""),
    ("/a?b#c", "/a", "b"),
])
def test_only_the_beginning_of_an_absolute_target_is_its_authority(
    serve: Callable[..., Running], target: str, path: str, query: str
) -> None:
    seen: dict[str, Any] = {}

    def note(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        seen.update(environ)
        return echo(environ, start_response)

    running = serve(note)
    with running.connect() as connection:
        ask(connection, f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert (seen["PATH_INFO"], seen["QUERY_STRING"]) == (path, query)


def test_an_exception_of_the_application_closes_the_connection_only(
    serve: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        if environ["PATH_INFO"] == "/fail":
            raise KeyError("unexpected")
        if environ["PATH_INFO"] == "/split":
            start_response("200 OK", [("X-Text", "a\r\nSet-Cookie: b")])
            return []
        return echo(environ, start_response)

    running = serve(fail)
    for path in (b"/fail", b"/split"):
        with running.connect() as connection:
            connection.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
            assert is_closed(connection)
    assert is_served(running)
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """A process in which every number below the limit of descriptors is used."""
    before, used = resource.getrlimit(resource.RLIMIT_NOFILE), []
    with open(os.devnull) as file:
        last = max(map(int, os.listdir("/proc/self/fd")))
        while not used or used[-1] <= last:
            used.append(os.dup(file.fileno()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for fd in used:
                os.close(fd)


def test_without_descriptors_requests_are_refused_and_connections_go_on(serve: Callable[..., Running]) -> None:
    running = serve()
    with running.connect() as former, contextlib.ExitStack() as stack:
        ask(former)
        # Their descriptors, before there is none.
        callers = [stack.enter_context(socket.socket()) for _ in range(3)]
        with no_descriptor_left():
            for caller in callers:
                caller.settimeout(TIMEOUT_S)
                caller.connect(running.listeners[0].getsockname())
                caller.sendall(GET)
                response = response_of(caller)
                assert response.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1\r\n" in response
                assert b"urn:nbagent:problem:full" in response and b"Too many open files" in response
            assert b"200 OK" in ask(former)
    assert is_served(running)


def test_connections_are_reset_while_the_machine_has_no_open_file_left(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve()
    with running.connect() as former, monkeypatch.context() as patched:
        ask(former)

        def exhausted(*_: object) -> None:
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

        # Both need a file of the kernel, also the one in reserve, because another process takes it.
        patched.setattr(socket.socket, "accept", exhausted)
        patched.setattr(os, "eventfd", exhausted)
        for _ in range(2):
            with pytest.raises((ConnectionResetError, ConnectionRefusedError)), running.connect() as caller:
                caller.sendall(GET)
                caller.recv(1)
        assert b"200 OK" in ask(former)
    assert is_served(running)


def test_a_listener_that_another_worker_has_shut_down_listens_again(serve: Callable[..., Running]) -> None:
    running = serve()
    running.listeners[0].shutdown(socket.SHUT_RD)
    until_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until_s:
        with contextlib.suppress(ConnectionRefusedError):
            assert is_served(running)
            return
    raise AssertionError("refused")


def test_a_request_for_which_no_thread_can_be_started_is_refused(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, release = threading.Event(), threading.Event()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        if environ["PATH_INFO"] == "/wait":
            begun.set()
            release.wait(TIMEOUT_S)
        return echo(environ, start_response)

    running = serve(app)
    with running.connect(trusted=True) as first, running.connect(trusted=True) as second:
        first.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        assert begun.wait(TIMEOUT_S)

        def refuse(_: object) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            response = ask(second)
        assert response.startswith(b"HTTP/1.1 503 ") and b"can't start new thread" in response
        release.set()
        assert b"GET /wait" in response_of(first)
        # The thread finds the refused request in its queue, and goes on.
        assert b"GET /a?b" in ask(first)
    assert is_served(running)


def test_a_stop_serves_what_was_accepted(serve: Callable[..., Running]) -> None:
    began, may_end = threading.Event(), threading.Event()

    def slow(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        began.set()
        may_end.wait(TIMEOUT_S)
        return echo(environ, start_response)

    running = serve(slow)
    with running.connect() as idle, running.connect() as busy:
        busy.sendall(GET)
        assert began.wait(TIMEOUT_S)
        running.stopping.set()
        assert idle.recv(1) == b""
        may_end.set()
        response = response_of(busy)
        assert response.endswith(b"GET /a?b ") and b"Connection: close" in response
    running.loop.join(TIMEOUT_S)
    assert not running.loop.is_alive()


@pytest.mark.parametrize(("address", "network"), [
    ("192.0.2.7", "192.0.2.7"), ("::ffff:192.0.2.7", "192.0.2.7"), ("2001:db8::1", "2001:db8::"),
    ("2001:db8::ffff:1", "2001:db8::"), ("2001:db8:0:1::1", "2001:db8:0:1::"), ("fe80::1%eth0", "fe80::"), ("", ""),
])
def test_the_network_of_an_address(address: str, network: str) -> None:
    assert network_of(address) == network


PIECES = st.one_of(
    st.binary(max_size=40), st.sampled_from(sorted(REQUESTS.values(), key=len)[:30]),
    st.sampled_from([GET, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n", b"12345", b"\r\n", b"0\r\n\r\n",
                     b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"5\r\n12345\r\n"]),
)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.lists(st.tuples(st.integers(0, 3), st.one_of(PIECES, st.none())), max_size=12))
def test_whatever_peers_send_no_connection_thread_or_byte_is_left(steps: list[tuple[int, bytes | None]]) -> None:
    running = Running(echo)
    try:
        peers: dict[int, socket.socket] = {}
        for number, piece in steps:
            with contextlib.suppress(OSError):
                if piece is None and number in peers:
                    peers.pop(number).close()
                elif piece is not None:
                    if number not in peers:
                        peers[number] = running.connect()
                    peers[number].sendall(piece)
        assert is_served(running)
        for peer in peers.values():
            peer.close()
        wait(lambda: not running.connections(), "no connection")
        for state in running.server._lanes.values():
            assert not (state.waiting or state.by_address or state.connections or state.received_bytes)
    finally:
        running.close()
