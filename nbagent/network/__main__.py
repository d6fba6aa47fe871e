"""The network service: the slots' interfaces and firewall rules. Only this process has CAP_NET_ADMIN.

    python3 -I -m nbagent.network            as nbagent-network.service, with a listening socket from systemd
    python3 -I -m nbagent.network --remove   removes all interfaces and rules, when the package is removed

A connection carries one request, a message of nbagent.wire.channel. Every request may be repeated.

    {"op": "rules"}                     applies the rules in /run/nbagent/network.json
    {"op": "attach", "name": str, "inner": str, "addresses": [str], "rate": int, "fds": ["netns"]}
                                        makes the interface, closed, with its inner end in that network namespace
    {"op": "open", "name": str}
    {"op": "remove", "name": str, "addresses": [str]}
    {"op": "sweep", "keep": [str]}      removes all interfaces but these

The response is {"ok": true} or a failure. The service keeps no state: after it was killed, the next request or systemd
starts it again, and the slots' connections go on.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import re
import selectors
import socket
import sys

from systemd import daemon

from nbagent.core.events import Event, emit
from nbagent.network.netlink import HostNetwork, lost_table, watch
from nbagent.network.rules import RULES_PATH, Rules
from nbagent.wire import fields
from nbagent.wire.channel import Channel, Message
from nbagent.wire.failure import Failure

_NAME = re.compile(r"nb-[0-9a-z]{12}")
# Names of a thousand slots' interfaces.
REQUEST_MAX_BYTES = 1 << 20
_RATE_MAX = 1 << 50
# One connection is served at a time, so a caller that sends nothing may not block the others.
_TIMEOUT_S = 5.0


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
                        _serve(kernel, Channel(listener.accept()[0], REQUEST_MAX_BYTES))
                elif lost_table(events) and RULES_PATH.exists() and not kernel.is_applied():
                    _apply(kernel)
                    emit(Event.NETWORK_RESTORED)


def _activated() -> int:
    fds = daemon.listen_fds()
    if len(fds) != 1:
        raise SystemExit("no listening socket from systemd: start nbagent-network.socket")
    return int(fds[0])


def _apply(kernel: HostNetwork) -> None:
    kernel.apply(Rules.restore(json.loads(RULES_PATH.read_text())))


def _serve(kernel: HostNetwork, channel: Channel) -> None:
    with channel, contextlib.suppress(OSError):
        channel.socket.settimeout(_TIMEOUT_S)
        try:
            if (request := channel.receive()) is None:
                return
            with request:
                if (uid := channel.peer_uid()) != 0:
                    raise PermissionError(errno.EPERM, f"user id {uid} may not use the network service")
                _do(kernel, request)
            response: dict[str, object] = {"ok": True}
        except Exception as error:  # the service has to serve the other slots' requests
            response = Failure.of(error, "network").save()
        channel.send(response)


def _do(kernel: HostNetwork, request: Message) -> None:
    body = request.body
    match body.get("op"):
        case "rules":
            _apply(kernel)
        case "attach":
            inner, rate = fields.text(body, "inner"), fields.integer(body, "rate", 0, _RATE_MAX)
            kernel.attach(_name(body), inner, request.fds["netns"], _addresses(body), rate)
        case "open":
            kernel.open(_name(body))
        case "remove":
            kernel.remove(_name(body), _addresses(body))
        case "sweep":
            kernel.sweep(fields.texts(body, "keep"))
        case unknown:
            raise ValueError(f"unknown operation {str(unknown)[:40]!r}")


def _name(body: dict[str, object]) -> str:
    name = fields.text(body, "name")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name[:20]!r} is not the name of a slot's interface")
    return name


def _addresses(body: dict[str, object]) -> list[str]:
    return [str(ipaddress.ip_address(address)) for address in fields.texts(body, "addresses")]


if __name__ == "__main__":
    main()
