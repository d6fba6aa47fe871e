# SPDX-License-Identifier: BSD-3-Clause
"""The requests of the network service, one a connection of nbagent.wire.channel. Every request may be repeated.

    {"op": "rules"}                     applies the rules in /run/nbagent/network.json
    {"op": "attach", "name": str, "inner": str, "addresses": [str], "rate": int, "fds": ["netns"]}
                                        makes the interface, closed, with its inner end in that network namespace
    {"op": "open", "name": str}
    {"op": "remove", "name": str, "addresses": [str]}
    {"op": "sweep", "keep": [str]}      removes all interfaces but these
    {"op": "check"}                     repairs what other programs have changed; fails while that is not possible
    {"op": "host"}                      responds {"ok": true, "ipv6": whether the host forwards it, "resolver": the
                                        text of its resolv.conf}

The response is {"ok": true} or a failure.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import socket
from typing import Protocol

from nbagent.network.addresses import forwards_ipv6
from nbagent.network.resolver import HOSTS_OWN
from nbagent.wire import fields
from nbagent.wire.channel import Channel, Message
from nbagent.wire.failure import Failure

# The names of all slots' interfaces.
REQUEST_MAX_BYTES = 1 << 20
RESOLVER_MAX_CHARACTERS = 8192
_NAME = re.compile(r"nb-[0-9a-z]{12}")
_RATE_MAX = 1 << 50
# One connection is served at a time, so a caller that sends nothing may not block the others.
_TIMEOUT_S = 5.0


class HostNetwork(Protocol):
    """The operations of nbagent.network.netlink.HostNetwork, which needs nftables and root."""

    def attach(self, name: str, inner: str, netns_fd: int, addresses: list[str], rate: int) -> None: ...

    def open(self, name: str) -> None: ...

    def remove(self, name: str, addresses: list[str]) -> None: ...

    def sweep(self, keep: list[str]) -> None: ...


class Upkeep(Protocol):
    """The operations of the service on all rules together (nbagent.network.__main__). Each raises OSError."""

    def apply(self) -> None: ...

    def check(self) -> None: ...


def serve(network: HostNetwork, connection: socket.socket, upkeep: Upkeep) -> None:
    """Serves one connection, and closes it."""
    with Channel(connection, REQUEST_MAX_BYTES) as channel, contextlib.suppress(OSError):
        channel.socket.settimeout(_TIMEOUT_S)
        try:
            if (request := channel.receive()) is None:
                return
            with request:
                if (uid := channel.peer_uid()) != 0:
                    raise PermissionError(errno.EPERM, f"user id {uid} may not use the network service")
                response: dict[str, object] = {"ok": True, **_repaired(network, request, upkeep)}
        except Exception as error:  # the service has to serve the other slots' requests
            response = Failure.of(error, "network").save()
        channel.send(response)


def _repaired(network: HostNetwork, request: Message, upkeep: Upkeep) -> dict[str, object]:
    """Does a request, once more after a repair if it failed: another program may just have deleted the table."""
    try:
        return _do(network, request, upkeep)
    except OSError:
        upkeep.check()
        return _do(network, request, upkeep)


def _do(network: HostNetwork, request: Message, upkeep: Upkeep) -> dict[str, object]:
    body = request.body
    match body.get("op"):
        case "rules":
            upkeep.apply()
        case "check":
            upkeep.check()
        case "attach":
            inner, rate = fields.text(body, "inner"), fields.integer(body, "rate", 0, _RATE_MAX)
            network.attach(_name(body), inner, request.fds["netns"], _addresses(body), rate)
        case "open":
            network.open(_name(body))
        case "remove":
            network.remove(_name(body), _addresses(body))
        case "sweep":
            network.sweep(fields.texts(body, "keep"))
        case "host":
            found = HOSTS_OWN.exists()
            text = HOSTS_OWN.read_text(errors="replace")[:RESOLVER_MAX_CHARACTERS] if found else ""
            return {"ipv6": forwards_ipv6(), "resolver": text}
        case unknown:
            raise ValueError(f"unknown operation {str(unknown)[:40]!r}")
    return {}


def _name(body: dict[str, object]) -> str:
    name = fields.text(body, "name")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name[:20]!r} is not the name of a slot's interface")
    return name


def _addresses(body: dict[str, object]) -> list[str]:
    return [str(ipaddress.ip_address(address)) for address in fields.texts(body, "addresses")]
