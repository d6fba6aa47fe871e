"""The control socket: how the API asks the supervisor, and the wire both speak.

One connection is one request and one answer, each a packet of JSON on a SOCK_SEQPACKET socket,
so a request needs no framing and a caller that goes away is seen at once. What is too large for
a packet travels as a sealed memfd beside an empty object. The requests:

    {"op": "claim", "args": {"options": {...}, "key": str, "client": str}}
    {"op": "slots" | "stats" | "images" | "drain" | "undrain" | "recycle_pool", "args": {}}
    {"op": "slot" | "release", "args": {"id": str}}
    {"op": "update", "args": {"id": str, "options": {...}}}

and the answers: {"ok": document} or {"error": NbagentError.to_wire()}.

Nothing here decides anything; who may connect is the socket's mode and the supervisor's check of
SO_PEERCRED.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
from pathlib import Path
from typing import Any

from nbagent.core import paths
from nbagent.core.claim_content import FILES_MAX_BYTES
from nbagent.core.errors import SupervisorUnavailable, from_wire

SOCKET_PATH = paths.CONTROL_SOCKET
# Below net.core.wmem_default (212,992 bytes on every Debian kernel), beyond which a packet is
# refused with EMSGSIZE.
PACKET_MAX_BYTES = 128 * 1024
# A byte of a file is at most six where JSON escapes it; there are other options, and names around all.
REQUEST_MAX_BYTES = 6 * FILES_MAX_BYTES + 256 * 1024
# A thousand slots are a megabyte.
ANSWER_MAX_BYTES = 256 << 20
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
# What may be asked again when the supervisor ended before it answered: the socket is systemd's, so
# the second connection waits until its successor has adopted every slot.
REPEATABLE = frozenset({"claim", "slots", "slot", "stats", "images", "drain", "undrain"})
TRIES = 3
# With a space in it, so no caller's Idempotency-Key is ever one.
OWN_KEY_PREFIX = "own "


def send(connection: socket.socket, document: dict[str, Any]) -> None:
    """Sends one answer or request. Raises OSError when the other side is gone."""
    payload = json.dumps(document, separators=(",", ":")).encode()
    if len(payload) <= PACKET_MAX_BYTES:
        connection.sendall(payload)
        return
    with open(os.memfd_create("nbagent-packet", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb") as large:
        large.write(payload)
        large.flush()
        fcntl.fcntl(large, fcntl.F_ADD_SEALS, _SEALS)
        socket.send_fds(connection, [b"{}"], [large.fileno()])


def receive_bytes(connection: socket.socket, limit_bytes: int) -> bytes:
    """Receives what `send` sent, b"" when the other side is gone.

    Raises OSError or ValueError when it is too large, or is beside the packet in anything but a sealed
    memfd: nothing else is sure to be read at once and to stay as it is.
    """
    payload, fds, _, _ = socket.recv_fds(connection, PACKET_MAX_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    if not fds:
        return payload
    try:
        size = os.fstat(fds[0]).st_size
        if fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & _SEALS != _SEALS or size > limit_bytes:
            raise ValueError(f"more than {limit_bytes} bytes, or not sealed")
        return os.pread(fds[0], size, 0)
    finally:
        os.close(fds[0])


def receive(connection: socket.socket) -> dict[str, Any]:
    """Receives one answer. Raises EOFError when there is none, ValueError when it is not one."""
    payload = receive_bytes(connection, ANSWER_MAX_BYTES)
    if not payload:
        raise EOFError("the supervisor closed the connection")
    document = json.loads(payload)
    if not isinstance(document, dict):
        raise ValueError("the supervisor's answer is no object")
    return document


class ControlClient:
    """Calls the supervisor; safe to share between threads, as every call has its own connection."""

    def __init__(self, path: Path = SOCKET_PATH, timeout_s: float = 60.0) -> None:
        self.path = path
        self.timeout_s = timeout_s

    def call(self, op: str, **args: Any) -> Any:
        """The document that answers `op`.

        A claim without a key gets one of our own, so that asking again never takes two slots.
        Raises the NbagentError that the supervisor raised, or SupervisorUnavailable.
        """
        if op == "claim" and args.get("key") is None:
            args["key"] = OWN_KEY_PREFIX + secrets.token_hex(16)
        tries = TRIES if op in REPEATABLE else 1
        while True:
            tries -= 1
            try:
                answer = self._call_once({"op": op, "args": args})
            except (OSError, EOFError, ValueError) as error:
                if tries and isinstance(error, (EOFError, ConnectionResetError)):
                    continue
                raise SupervisorUnavailable(
                    f"the supervisor does not answer on {self.path}: {error}", retry_after_s=2
                ) from error
            if "error" in answer:
                raise from_wire(answer["error"])
            return answer["ok"]

    def _call_once(self, request: dict[str, Any]) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(self.timeout_s)
            connection.connect(str(self.path))
            send(connection, request)
            return receive(connection)
