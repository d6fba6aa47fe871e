# SPDX-License-Identifier: BSD-3-Clause
"""Checks of the records of a host, or of a gateway's part in them, for `nbagent dns check` and `nbagent doctor`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

from nbagent.config.host_config import HostConfig
from nbagent.core.errors import ConfigError, NbagentError
from nbagent.dns import key, removal
from nbagent.dns.publisher import MACHINE_ID, UNIT, Registry, place_of
from nbagent.dns.records import Agent, Place, Presence, Seen, decide, permissions
from nbagent.dns.server import Server
from nbagent.gateway.settings import GatewaySettings

OK: Final = "ok"
WARN: Final = "warn"
FAIL: Final = "fail"
COLUMNS = ("CHECK", "STATUS", "FOUND")
# No host has this label, because labels have no "-".
_NO_HOST = "nbagent-dns-check"


class Result(NamedTuple):
    """The result of one check."""

    check: str
    status: Literal["ok", "warn", "fail"]
    found: str


def check_host(config: HostConfig, agent: Callable[[], Agent], key_file: Path | None = None) -> Iterator[Result]:
    """The checks of a host; the last one is the first that fails."""
    step = "settings"
    try:
        place_of(config)  # first, because a host without dns.server needs no key
        registry = Registry(config, key.read(key_file), MACHINE_ID.read_text())
        place, server = registry.place, registry.server
        yield Result(step, OK, f"{place.host} and {place.service} in zone {place.zone} at {server.server}")
        step = "server"
        yield from _check_server(server, place)
        step = "records"
        own, seen = registry.own(), server.seen(place)
        missing = decide(own, seen, Presence.OFFERED, None)
    except (NbagentError, OSError) as error:
        yield Result("settings" if isinstance(error, ConfigError) else step, FAIL, str(error))
        return
    state = agent()
    if state is Agent.READY and missing:
        yield Result(step, WARN, f"{describe(seen)}, but the host is ready: systemctl enable --now {UNIT}")
    elif state is not Agent.READY and seen.offered:
        yield Result(step, WARN, f"{describe(seen)}, but the agent is {state.value}: systemctl restart {UNIT}")
    else:
        yield Result(step, OK, f"{describe(seen)}; the agent is {state.value}")


def check_gateway(found: GatewaySettings, key_file: Path | None = None) -> Iterator[Result]:
    """The checks of a gateway that removes the records of dead hosts."""
    step = "settings"
    try:
        removal.require_settings(found)
        server, domain = removal.server_of(found, key.read(key_file))
        yield Result(step, OK, f"hosts of {domain} in zone {server.zone} at {server.server}")
        step = "server"
        yield from _check_server(server, Place(server.zone, domain, _NO_HOST))
    except NbagentError as error:
        yield Result(step, FAIL, str(error))


def describe(seen: Seen) -> str:
    """The records of a host in words."""
    addresses = ", ".join(sorted(seen.addresses)) or "no address"
    return f"{addresses}, {'an SRV record' if seen.offered else 'no SRV record'}"


def _check_server(server: Server, place: Place) -> Iterator[Result]:
    server.check_zone()
    yield Result("server", OK, f"{server.server} is authoritative for {server.zone}")
    server.apply(permissions(place))
    yield Result("permission", OK, f"TSIG key {server.key.name} may change A, AAAA, TXT and SRV records")
