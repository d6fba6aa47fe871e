# SPDX-License-Identifier: BSD-3-Clause
"""A client of one slot's server by its socket on this host: requests, and messages of a websocket (RFC 6455).

For root, because the socket's directory is the router's. The server is an image's code, so what it sends is bounded.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

_MESSAGE_MAX_BYTES = 64 << 20
_BODY_MAX_BYTES = 1 << 20
_TEXT, _CONTINUATION, _CLOSE, _PING, _PONG = 1, 0, 8, 9, 10


class Response(NamedTuple):
    """The response to a request, and the seconds until its headers."""

    status: int
    body: bytes
    took_s: float

    def json(self) -> Any:
        """The document in the body. Raises ValueError."""
        return json.loads(self.body)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = _connect(self._path, self.timeout or 0)


def _connect(path: Path, timeout_s: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout_s)
    try:
        connection.connect(os.fspath(path))
    except OSError:
        connection.close()
        raise
    return connection


class SlotClient:
    """The server at the socket `path`, with the slot's path and token."""

    def __init__(self, path: Path, base_path: str, token: str) -> None:
        self._path, self._base_path = path, base_path
        self._headers = {"Authorization": f"token {token}"}

    def request(self, method: str, path: str, body: object = None, timeout_s: float = 30.0) -> Response:
        """Sends a request below the slot's path. Raises OSError, TimeoutError too, and HTTPException."""
        headers = self._headers | ({} if body is None else {"Content-Type": "application/json"})
        with closing(_Connection(self._path, timeout_s)) as connection:
            began_s = time.monotonic()
            connection.request(method, self._base_path + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            took_s = time.monotonic() - began_s
            # A handler may stream its response without end.
            content = b"" if response.status >= 300 else response.read(_BODY_MAX_BYTES)
            return Response(response.status, content, took_s)

    def websocket(self, path: str, timeout_s: float = 30.0) -> Websocket:
        """Opens a websocket below the slot's path. Raises OSError."""
        connection = _connect(self._path, timeout_s)
        try:
            key = base64.b64encode(secrets.token_bytes(16)).decode()
            headers = {"Host": "localhost", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": key,
                       "Sec-WebSocket-Version": "13", **self._headers}
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            connection.sendall(f"GET {self._base_path}{path} HTTP/1.1\r\n{lines}\r\n".encode())
            response = http.client.HTTPResponse(connection)
            response.begin()
            if response.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
                raise ConnectionError(f"status {response.status} instead of a websocket")
            return Websocket(connection, response)
        except BaseException:
            connection.close()
            raise


class Websocket:
    """An open websocket. A context manager."""

    def __init__(self, connection: socket.socket, response: http.client.HTTPResponse) -> None:
        # The response's buffer may have the beginning of the first message.
        self._socket, self._response, self._reader = connection, response, response.fp

    def __enter__(self) -> Websocket:
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()
        self._socket.close()

    def send(self, message: object) -> None:
        """Sends a JSON document."""
        self._send(_TEXT, json.dumps(message).encode())

    def messages(self, until_s: float) -> Iterator[Any]:
        """The JSON documents that are received until the monotonic time `until_s`; then raises TimeoutError.

        Binary messages are skipped. Raises OSError.
        """
        content = b""
        while True:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("no message")
            self._socket.settimeout(left_s)
            first, second = self._read(2)
            size = second & 0x7F
            if size == 126:
                size, = struct.unpack("!H", self._read(2))
            elif size == 127:
                size, = struct.unpack("!Q", self._read(8))
            if size + len(content) > _MESSAGE_MAX_BYTES:
                raise ConnectionError(f"a message of more than {_MESSAGE_MAX_BYTES} bytes")
            payload, kind = self._read(size), first & 0x0F
            if kind == _CLOSE:
                raise ConnectionError("the websocket was closed")
            if kind == _PING:
                self._send(_PONG, payload)
            elif kind in (_TEXT, _CONTINUATION):
                content += payload
                if first & 0x80:
                    message, content = content, b""
                    yield json.loads(message)

    def _send(self, kind: int, payload: bytes) -> None:
        mask = secrets.token_bytes(4)
        size = len(payload)
        length = struct.pack("!B", 0x80 | size) if size < 126 else struct.pack("!BH", 0xFE, size)
        if size > 0xFFFF:
            length = struct.pack("!BQ", 0xFF, size)
        masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
        self._socket.sendall(bytes([0x80 | kind]) + length + mask + masked)

    def _read(self, size: int) -> bytes:
        content = self._reader.read(size) if size else b""
        if len(content) < size:
            raise ConnectionError("the websocket was closed")
        return content
