# SPDX-License-Identifier: BSD-3-Clause
"""HTTP requests that are malformed or ambiguous, for tests of every listener."""

from __future__ import annotations

import socket

_CHUNKS = b"2\r\n{}\r\n0\r\n\r\n"


def _post(*headers: bytes, body: bytes = b"", line: bytes = b"POST /claim HTTP/1.1") -> bytes:
    return b"\r\n".join([line, b"Host: localhost", b"Content-Type: application/json", *headers, b"", body])


# Two servers could understand each of these in different ways, or it is no HTTP at all.
REQUESTS = {
    "transfer encoding xchunked": _post(b"Transfer-Encoding: xchunked", body=_CHUNKS),
    "transfer encoding identity, chunked": _post(b"Transfer-Encoding: identity, chunked", body=_CHUNKS),
    "transfer encoding chunked, identity": _post(b"Transfer-Encoding: chunked, identity", body=_CHUNKS),
    "transfer encoding with a vertical tab": _post(b"Transfer-Encoding: \x0bchunked", body=_CHUNKS),
    "chunked twice in one header": _post(b"Transfer-Encoding: chunked, chunked", body=_CHUNKS),
    "chunked twice in two headers": _post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=_CHUNKS),
    "chunked and a length": _post(b"Transfer-Encoding: chunked", b"Content-Length: 2", body=_CHUNKS),
    "a length and chunked": _post(b"Content-Length: 2", b"Transfer-Encoding: chunked", body=_CHUNKS),
    "two lengths": _post(b"Content-Length: 2", b"Content-Length: 3", body=b"{} "),
    "a negative length": _post(b"Content-Length: -1"),
    "a signed length": _post(b"Content-Length: +2", body=b"{}"),
    "a length with an underscore": _post(b"Content-Length: 0_2", body=b"{}"),
    "a length that is no number": _post(b"Content-Length: two", body=b"{}"),
    "a space before the colon": _post(b"Content-Length : 2", body=b"{}"),
    "a continued header": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Long: a\r\n b\r\n\r\n",
    "a continuation as the first header": b"GET /healthz HTTP/1.1\r\n Host: localhost\r\n\r\n",
    "NUL in a header": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Text: a\0b\r\n\r\n",
    "NUL in the name of a header": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-\0: a\r\n\r\n",
    "NUL in the target": b"GET /heal\0thz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a carriage return in a header": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Text: a\rb\r\n\r\n",
    "a header without a colon": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nnonsense\r\n\r\n",
    "a header without a name": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n: value\r\n\r\n",
    "a header of 100,000 bytes": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Long: " + 100_000 * b"a" + b"\r\n\r\n",
    "a target of 100,000 bytes": b"GET /" + 100_000 * b"a" + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a method that is no token": b"G(T /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an unknown method": b"BREW /claim HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "CONNECT": b"CONNECT localhost:9000 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "HTTP/0.9": b"GET /healthz\r\n\r\n",
    "HTTP/2.0": b"GET /healthz HTTP/2.0\r\nHost: localhost\r\n\r\n",
    "HTTP/1.10": b"GET /healthz HTTP/1.10\r\nHost: localhost\r\n\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a TLS handshake": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + 64 * b"\xaa" + b"\r\n\r\n",
    "a target that is no path": b"GET healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no Host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: example.org\r\n\r\n",
    "a broken chunk": _post(b"Transfer-Encoding: chunked", body=b"zz\r\n{}\r\n0\r\n\r\n"),
    "a chunk without its end": _post(b"Transfer-Encoding: chunked", body=b"2\r\n{}0\r\n\r\n"),
    "chunks by HTTP/1.0": _post(b"Transfer-Encoding: chunked", body=_CHUNKS, line=b"POST /claim HTTP/1.0"),
}


def status_of(connection: socket.socket, request: bytes) -> int | None:
    """The status of the first response to `request`, None when the connection is closed without one."""
    received = b""
    with connection:
        try:
            connection.sendall(request)
            while len(received) < 12 and (data := connection.recv(4096)):
                received += data
        except (BrokenPipeError, ConnectionResetError):
            return None
    return int(received[9:12]) if received.startswith(b"HTTP/") else None
