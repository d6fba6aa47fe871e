"""The control socket: how the API asks the supervisor, and the wire both speak.

One connection is one request and one answer, each a packet of JSON on a SOCK_SEQPACKET socket,
so a request needs no framing and a caller that goes away is seen at once. An answer too large
for a packet travels as a memfd beside an empty object. The requests:

    {"op": "claim", "args": {"options": {...}, "key": str | null, "client": str}}
    {"op": "slots" | "stats" | "images" | "drain" | "undrain", "args": {}}
    {"op": "slot" | "release", "args": {"id": str}}
    {"op": "update", "args": {"id": str, "options": {...}}}

and the answers: {"ok": document} or {"error": NbagentError.to_wire()}.

Nothing here decides anything; who may connect is the socket's mode and the supervisor's check of
SO_PEERCRED.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from nbagent.errors import SupervisorUnavailable, from_wire

SOCKET_PATH = Path("/run/nbagent/control.sock")
# Below net.core.wmem_default (212,992 bytes on every Debian kernel), beyond which a packet is
# refused with EMSGSIZE.
PACKET_MAX_BYTES = 128 * 1024
REQUEST_MAX_BYTES = 64 * 1024


def send(connection: socket.socket, document: dict[str, Any]) -> None:
    """Sends one answer or request. Raises OSError when the other side is gone."""
    payload = json.dumps(document, separators=(",", ":")).encode()
    if len(payload) <= PACKET_MAX_BYTES:
        connection.sendall(payload)
        return
    with open(os.memfd_create("nbagent-answer", os.MFD_CLOEXEC), "r+b") as large:
        large.write(payload)
        large.flush()
        socket.send_fds(connection, [b"{}"], [large.fileno()])


def receive(connection: socket.socket) -> dict[str, Any]:
    """Receives one answer. Raises EOFError when there is none, ValueError when it is not one."""
    payload, fds, _, _ = socket.recv_fds(connection, PACKET_MAX_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    if fds:
        with open(fds[0], "rb") as large:
            large.seek(0)
            payload = large.read()
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

        Raises the NbagentError that the supervisor raised, or SupervisorUnavailable.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(self.timeout_s)
            try:
                connection.connect(str(self.path))
                send(connection, {"op": op, "args": args})
                answer = receive(connection)
            except (OSError, EOFError, ValueError) as error:
                raise SupervisorUnavailable(
                    f"the supervisor does not answer on {self.path}: {error}", retry_after_s=2
                ) from error
        if "error" in answer:
            raise from_wire(answer["error"])
        return answer["ok"]
