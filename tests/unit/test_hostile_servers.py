# SPDX-License-Identifier: BSD-3-Clause
"""The download of a claim's archive from servers that send what they must not, or redirect to where they must not."""

from __future__ import annotations

import signal
import socket
import ssl
import threading
from collections.abc import Iterator

import pytest

import hostile
from nbagent.content import deliver, download
from nbagent.content.beneath_writer import BeneathWriter
from nbagent.content.unpack import UnpackLimits, unpack
from nbagent.core.proxies import HttpProxy
from nbagent.untrusted.refusal import Refused

LIMITS = UnpackLimits(1 << 20, 100)
OK = b"HTTP/1.1 200 OK\r\n"
CONTEXT = ssl.create_default_context()
ARCHIVE = hostile.file("x", b"1") + hostile.END


class Server:
    """A server of raw bytes: `first` once for each connection, then `again` until the client closes."""

    def __init__(self, first: bytes, again: bytes = b"") -> None:
        self._first, self._again = first, again
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                try:
                    self.received(connection.recv(65536))
                    connection.sendall(self._first)
                    while self._again:
                        connection.sendall(self._again)
                except OSError:
                    continue

    def received(self, request: bytes) -> None:
        """Called with each request."""

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


@pytest.fixture
def serve() -> Iterator[type[Server]]:
    made = []

    class Closed(Server):
        def __init__(self, first: bytes, again: bytes = b"") -> None:
            super().__init__(first, again)
            made.append(self)

    yield Closed
    for server in made:
        server.close()


@pytest.fixture
def home(tmp_path) -> Iterator[BeneathWriter]:
    (tmp_path / "home").mkdir()
    with BeneathWriter(str(tmp_path / "home")) as home:
        yield home


def fetch(server: Server, home: BeneathWriter) -> int:
    url = f"http://127.0.0.1:{server.port}/ok/"
    with download.get(url, [url], CONTEXT) as body:
        return unpack(body, home, LIMITS)


def test_an_archive_of_a_raw_server_is_unpacked(serve, home) -> None:
    """The others could fail because of the server."""
    assert fetch(serve(OK + b"\r\n" + ARCHIVE), home) == 1


class Proxy(Server):
    """An HTTP proxy that keeps the requests and gives `first` as the response to each."""

    def __init__(self, first: bytes, again: bytes = b"") -> None:
        self.requests: list[bytes] = []
        super().__init__(first, again)

    def received(self, request: bytes) -> None:
        self.requests.append(request)


def test_an_archive_is_fetched_by_the_proxy_and_never_around_it(home) -> None:
    """The name of the server does not resolve here, so that only the proxy can have fetched it."""
    server = Proxy(OK + b"\r\n" + ARCHIVE)
    try:
        # HttpProxy and not parse(), which refuses a proxy on loopback.
        proxy, url = HttpProxy("127.0.0.1", server.port), "http://data.invalid:8080/a.tar?b=c"
        with download.get(url, [url], CONTEXT, proxy) as body:
            assert unpack(body, home, LIMITS) == 1
        assert server.requests[0].startswith(b"GET http://data.invalid:8080/a.tar?b=c HTTP/1.1\r\n")
        assert b"\r\nHost: data.invalid:8080\r\n" in server.requests[0]
        direct = "http://127.0.0.1:1/a.tar"
        with pytest.raises(Refused, match=r"^127\.0\.0\.1: "), download.get(direct, [direct], CONTEXT, proxy):
            pass
        assert len(server.requests) == 1
    finally:
        server.close()


def test_a_proxy_that_refuses_a_tunnel_is_named(serve) -> None:
    server = serve(b"HTTP/1.1 403 Filtered\r\n\r\n")
    proxy, url = HttpProxy("127.0.0.1", server.port), "https://data.invalid/a.tar"
    expected = rf"data\.invalid by the proxy 127\.0\.0\.1:{server.port}: Tunnel connection failed: 403 Filtered"
    with pytest.raises(Refused, match=expected), download.get(url, [url], CONTEXT, proxy):
        pass


def test_a_redirect_by_the_proxy_to_anywhere_else_is_refused(serve) -> None:
    server = serve(b"HTTP/1.1 302 Found\r\nLocation: http://meta.invalid/\r\n\r\n")
    url = "http://data.invalid/a.tar"
    with pytest.raises(Refused, match=r"redirected to http://meta\.invalid/, which this host does not allow"), \
            download.get(url, [url], CONTEXT, HttpProxy("127.0.0.1", server.port)):
        pass
    assert server.connections == 1


@pytest.mark.parametrize(("first", "again"), [
    (b"", b""), (b"\0\xff" * 500, b""), (b"HTTP/1.1\r\n\r\n", b""), (b"HTTP/1.1 nan OK\r\n\r\n", b""),
    (b"HTTP/1.1 99999999999999999999 OK\r\n\r\n", b""), (b"HTTP/9.9 200 OK\r\n\r\n", b""), (b"x" * 100, b"x" * 1000),
    (OK, b"a: b\r\n"), (OK + b"a: ", b"b" * 1000), (OK + b": \0\r\n" * 5 + b"\r\n", b""),
    (OK + b"Content-Length: -5\r\n\r\n", b""), (OK + b"Content-Length: 1e999\r\n\r\n", b""),
    (OK + b"Content-Length: 99999999999999999999\r\n\r\n" + ARCHIVE, b""),
    (OK + b"\r\n", bytes(1000)), (OK + b"\r\n", b"PK\3\4" * 100),
    (OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n" + ARCHIVE, b"x" * 1000),
    (OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n" + ARCHIVE, b""),
    (OK + b"Transfer-Encoding: chunked\r\n\r\nx\r\n" + ARCHIVE, b""),
    (OK + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFFFF\r\n" + ARCHIVE, b""),
    (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1" * 1000), (OK + b"Transfer-Encoding: xchunked\r\n\r\n", b""),
    (OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n", b""),
    (OK + b"Content-Encoding: gzip\r\n\r\n" + b"\x1f\x8b", b""),
    *((b"HTTP/1.1 302 Found\r\nLocation: " + target + b"\r\n\r\n", b"") for target in (
        b"http://[", b"http://[::1", b"\xff\xfe", b"http://127.0.0.1:99999/ok/", b"http://127.0.0.1:x/ok/", b"//", b"",
        b"/ok/" + b"a" * 5000, b"http://\xe2\x84\x80/")),
    (b"HTTP/1.1 404 " + b"\x1b[2J" * 10_000 + b"\r\n\r\n", b""),
], ids=lambda value: ascii(value)[2:50])
def test_a_hostile_response_is_refused(serve, home, first: bytes, again: bytes) -> None:
    with pytest.raises(Refused) as refused:
        fetch(serve(first, again), home)
    assert len(str(refused.value)) < 5000


@pytest.mark.parametrize(("first", "again"), [
    (b"", b"HTTP/1.1 100 Continue\r\n\r\n"), (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n"),
], ids=["continue", "trailers"])
def test_a_response_without_end_is_refused_at_the_deadline(serve, home, first: bytes, again: bytes) -> None:
    """As in the process that delivers, which has one timer for everything (deliver._inside)."""
    previous = signal.signal(signal.SIGALRM, deliver._on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(Refused, match="content was not delivered in time"):
            fetch(serve(first, again), home)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("target", [
    "http://127.0.0.1:{other}/ok/", "http://127.0.0.1:{other}/", "//127.0.0.1:{other}/ok/", "http://localhost:{other}/",
    "http://2130706433:{other}/ok/", "http://0x7f000001:{other}/ok/", "http://0177.0.0.1:{other}/ok/",
    "http://127.1:{other}/ok/", "http://0:{other}/ok/", "http://[::ffff:127.0.0.1]:{other}/ok/",
    "http://[::1]:{other}/ok/", "http://[0:0:0:0:0:ffff:7f00:1]:{other}/ok/",
    # The same server by another spelling or path, or with a user.
    "http://2130706433:{port}/ok/", "http://localhost:{port}/ok/", "http://127.0.0.1.:{port}/ok/",
    "http://[::ffff:127.0.0.1]:{port}/ok/", "http://user@127.0.0.1:{port}/ok/", "http://127.0.0.1:{port}@x/ok/",
    "http://x:y@127.0.0.1:{port}/ok/", "https://127.0.0.1:{port}/ok/", "http://127.0.0.1:{port}/",
    "http://127.0.0.1:{port}/ok/../private", "http://127.0.0.1:{port}/ok/%2e%2e/private",
    "http://127.0.0.1:{port}/ok/..%2fprivate", "http://127.0.0.1:{port}/ok/..;/private",
    "http://127.0.0.1:{port}/ok\\..\\private", "http://127.0.0.1:{port}\\@127.0.0.1:{other}/ok/",
    "http://127.0.0.1:{port}/ok/#@127.0.0.1:{other}/", "http:///127.0.0.1:{other}/ok/",
    "file:///etc/passwd", "ftp://127.0.0.1:{other}/ok/", "gopher://127.0.0.1:{other}/ok/", "data:,x", "unix:/run/x",
    "http+unix://%2frun%2fnbagent%2fcontrol.sock/", "\thttp://127.0.0.1:{other}/ok/", "http://127.0.0.1:{other}?/ok/",
    "http://\N{FULLWIDTH DIGIT ONE}27.0.0.1:{other}/ok/", "HTTP://127.0.0.1:{other}/ok/",
])
def test_a_redirect_to_anywhere_else_is_refused_before_a_connection(serve, home, target: str) -> None:
    other = serve(OK + b"\r\n" + ARCHIVE)
    server = Server(b"")
    location = target.format(other=other.port, port=server.port).encode()
    server._first = b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\n\r\n"
    try:
        with pytest.raises(Refused, match=r"redirected to|127\.0\.0\.1: "):
            fetch(server, home)
    finally:
        server.close()
    assert (server.connections, other.connections) == (1, 0)
