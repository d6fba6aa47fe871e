"""The network service: the slots' interfaces and rules, done by the only part that may do it.

    python3 -I -m nbagent.network            as nbagent-network.service, on a socket of systemd's
    python3 -I -m nbagent.network --remove   takes back everything, when the package goes

One request is one connection: a packet of JSON on a SOCK_SEQPACKET socket, and for `attach` a
descriptor of the slot's network namespace beside it. Every request may be repeated.

    {"op": "rules"}                     /run/nbagent/network.json says which
    {"op": "attach", "name": str, "inner": str, "addresses": [str], "rate": int}    makes the interface, closed
    {"op": "open", "name": str}
    {"op": "remove", "name": str, "addresses": [str]}
    {"op": "sweep", "keep": [str]}

and the answers: {"ok": true} or {"error": str}. It holds no state: killed at any moment it is
started by the next request, or by systemd, and no connection of a slot knows.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import selectors
import socket
import struct
import sys
from typing import Any

from systemd import daemon

from nbagent.core.events import Event, emit
from nbagent.network.netlink import HostNetwork, lost_table, watch
from nbagent.network.rules import RULES_PATH, Rules

_REQUEST_BYTES = 65536
_NAME = re.compile(r"nb-[0-9a-z]{12}")
# A caller that connects and says nothing does not keep the others waiting.
_PATIENCE_S = 5.0


def main() -> None:
    """Serves until SIGTERM."""
    kernel = HostNetwork()
    if sys.argv[1:] == ["--remove"]:
        kernel.remove_all()
        kernel.close()
        return
    listener = socket.socket(fileno=_activated())
    listener.setblocking(False)
    with listener, watch() as events, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(events, selectors.EVENT_READ)
        if RULES_PATH.exists():
            _apply(kernel)
        daemon.notify("READY=1")
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    with contextlib.suppress(BlockingIOError):
                        _serve(kernel, listener.accept()[0])
                elif lost_table(events) and RULES_PATH.exists() and not kernel.is_applied():
                    _apply(kernel)
                    emit(Event.NETWORK_RESTORED)


def _activated() -> int:
    fds = daemon.listen_fds()
    if len(fds) != 1:
        raise SystemExit("no socket: start nbagent-network.socket")
    return int(fds[0])


def _apply(kernel: HostNetwork) -> None:
    kernel.apply(Rules.restore(json.loads(RULES_PATH.read_text())))


def _serve(kernel: HostNetwork, connection: socket.socket) -> None:
    with connection:
        connection.settimeout(_PATIENCE_S)
        with contextlib.suppress(OSError):
            payload, fds, _, _ = socket.recv_fds(connection, _REQUEST_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            try:
                connection.send(json.dumps(_answer(kernel, connection, payload, fds)).encode())
            finally:
                for fd in fds:
                    os.close(fd)


def _answer(kernel: HostNetwork, connection: socket.socket, payload: bytes, fds: list[int]) -> dict[str, Any]:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    if struct.unpack("3i", credentials)[1] != 0:
        return {"error": "only root may ask"}
    try:
        request = json.loads(payload)
        _do(kernel, request, fds)
    except Exception as error:  # the next request is another slot's
        return {"error": f"{type(error).__name__}: {error}"}
    return {"ok": True}


def _do(kernel: HostNetwork, request: dict[str, Any], fds: list[int]) -> None:
    match request["op"]:
        case "rules":
            _apply(kernel)
        case "attach":
            (netns_fd,) = fds
            kernel.attach(_name(request), str(request["inner"]), netns_fd, _addresses(request), int(request["rate"]))
        case "open":
            kernel.open(_name(request))
        case "remove":
            kernel.remove(_name(request), _addresses(request))
        case "sweep":
            kernel.sweep([str(name) for name in request["keep"]])
        case unknown:
            raise ValueError(f"unknown request {unknown!r}")


def _name(request: dict[str, Any]) -> str:
    name = str(request["name"])
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name[:20]!r} is no interface of a slot")
    return name


def _addresses(request: dict[str, Any]) -> list[str]:
    return [str(ipaddress.ip_address(address)) for address in request["addresses"]]


if __name__ == "__main__":
    main()
