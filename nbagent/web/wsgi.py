# SPDX-License-Identifier: BSD-3-Clause
"""Requests and responses of HTTP/1.1 as WSGI has them: what is refused, the environment of a request, the bytes of a
response. No I/O; `server` has the connections.

h11 parses requests and frames responses. A request that it accepts although a proxy could understand it in another way
(obsolete line folding, a length beside chunks) is refused. Headers with an underscore are dropped, because in WSGI they
equal the same name with a hyphen.
"""

from __future__ import annotations

import functools
import io
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from email.utils import formatdate
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import h11

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

# A deep link of 2,000 characters may be three times as long when percent-encoded.
TARGET_MAX_BYTES = 8190
HEAD_MAX_BYTES = 64 << 10
_END_OF_HEAD = re.compile(rb"\n\r?\n")
_FOLDED = re.compile(rb"\n[ \t]")
_ABSOLUTE = re.compile(r"\A[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")


class Refused(Exception):
    """A request that is malformed or too large; the text is for the peer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def environ_of(request: h11.Request, body: bytes, local: object, host: str, port: int) -> WSGIEnvironment:
    """The WSGI environment of a request. RAW_URI is the target as it was sent. Raises Refused.

    `local` is the address of the listener, as of getsockname(2); `host` and `port` are the peer's.
    """
    target = request.target.decode("latin-1")
    path, _, query = (_ABSOLUTE.sub("", target, count=1) or "/").partition("#")[0].partition("?")
    if not path.startswith("/") and (path, request.method) != ("*", b"OPTIONS"):
        raise Refused(400, "the target of the request is neither a path nor a URL")
    environ: WSGIEnvironment = {
        "REQUEST_METHOD": request.method.decode(),
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(path.encode("latin-1")).decode("latin-1"),
        "QUERY_STRING": query,
        "RAW_URI": target,
        "SERVER_NAME": str(local[0]) if isinstance(local, tuple) else "localhost",
        "SERVER_PORT": str(local[1]) if isinstance(local, tuple) else "80",
        "SERVER_PROTOCOL": f"HTTP/{request.http_version.decode()}",
        "REMOTE_ADDR": host,
        "REMOTE_PORT": str(port),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    for name, value in request.headers:
        if b"_" in name:
            continue
        key = name.decode().upper().replace("-", "_")
        key = key if key == "CONTENT_TYPE" else f"HTTP_{key}"
        text = value.decode("latin-1")
        environ[key] = f"{environ[key]},{text}" if key in environ else text
    # The body was received and its chunks were joined.
    environ.pop("HTTP_TRANSFER_ENCODING", None)
    environ.pop("HTTP_CONTENT_LENGTH", None)
    if _has_body(request):
        environ["CONTENT_LENGTH"] = str(len(body))
    return environ


def _has_body(request: h11.Request) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in request.headers)


def check(request: h11.Request, head: bytes, body_max_bytes: int) -> None:
    """Raises Refused for a request that h11 accepts and the server does not. `head` are the bytes of its head."""
    if request.http_version not in (b"1.0", b"1.1"):
        raise Refused(505, "the version of HTTP is neither 1.0 nor 1.1")
    if len(request.target) > TARGET_MAX_BYTES:
        raise Refused(414, f"the target of the request is longer than {TARGET_MAX_BYTES} bytes")
    head = _END_OF_HEAD.split(head, maxsplit=1)[0]
    if len(head) > HEAD_MAX_BYTES:
        raise Refused(431, f"the headers are longer than {HEAD_MAX_BYTES} bytes")
    if _FOLDED.search(head):
        raise Refused(400, "a header continues on a second line")
    headers = dict(request.headers)
    if b"transfer-encoding" in headers and (b"content-length" in headers or request.http_version == b"1.0"):
        raise Refused(400, "the length of the body is given in two ways, or chunks are sent by HTTP/1.0")
    length = headers.get(b"content-length", b"0")
    if int(length) > body_max_bytes:
        raise Refused(413, f"the body is longer than {body_max_bytes} bytes")


def run(app: WSGIApplication, environ: WSGIEnvironment) -> tuple[str, list[tuple[str, str]], bytes]:
    """Status, headers and body of the application's response."""
    status, headers = "", list[tuple[str, str]]()
    written = list[bytes]()

    def start_response(
        new_status: str, new_headers: list[tuple[str, str]], error: Any = None
    ) -> Callable[[bytes], object]:
        nonlocal status, headers
        status, headers = new_status, new_headers
        return written.append

    parts: Iterable[bytes] = app(environ, start_response)
    try:
        body = b"".join([*written, *parts])
    finally:
        if close := getattr(parts, "close", None):
            close()
    return status, headers, body


@functools.lru_cache(1)
def _date(time_s: int) -> bytes:
    return formatdate(time_s, usegmt=True).encode()


def frame(parser: h11.Connection, status: str, headers: Sequence[tuple[str, str]], body: bytes) -> bytes:
    """A whole response as bytes. Raises LocalProtocolError when the parser expects no response."""
    code, _, reason = status.partition(" ")
    given = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    if not any(name.lower() == b"content-length" for name, _ in given) and int(code) not in (204, 304):
        given.append((b"Content-Length", str(len(body)).encode()))
    given.append((b"Date", _date(int(time.time()))))
    response = h11.Response(status_code=int(code), headers=given, reason=reason.encode("latin-1"))
    parts = [parser.send(response)]
    if body:
        parts.append(parser.send(h11.Data(data=body)))
    parts.append(parser.send(h11.EndOfMessage()))
    return b"".join(part or b"" for part in parts)

