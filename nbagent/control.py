"""The control socket: how the API asks the supervisor, and the wire both speak.

One connection is one request and one answer, each a packet of JSON on a SOCK_SEQPACKET socket,
so a request needs no framing and a caller that goes away is seen at once. An answer too large
for a packet travels as a memfd beside an empty object. The requests:

    {"op": "claim", "args": {"options": {...}, "key": str, "client": str}}
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
import secrets
import socket
from pathlib import Path
from typing import Any

from nbagent.errors import SupervisorUnavailable, from_wire

SOCKET_PATH = Path("/run/nbagent/control.sock")
# Below net.core.wmem_default (212,992 bytes on every Debian kernel), beyond which a packet is
# refused with EMSGSIZE.
PACKET_MAX_BYTES = 128 * 1024
REQUEST_MAX_BYTES = 64 * 1024
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
