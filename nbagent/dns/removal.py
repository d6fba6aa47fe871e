# SPDX-License-Identifier: BSD-3-Clause
"""The loop of nbagent-gateway-dns.service: removes the records of hosts that died.

A gateway does this, and not a peer of the host: it connects to all hosts for its users anyway, so HAProxy's health
checks are the evidence, and the key that may change the names of every host is on a machine that runs no notebooks.
records.SilenceRule has the rule. Records that no host has published are never removed.
"""

from __future__ import annotations

from collections.abc import Callable

from nbagent.core.errors import ConfigError, NbagentError
from nbagent.core.events import Event
from nbagent.dns.key import Key
from nbagent.dns.records import Place, SilenceRule, is_owner_text, remove
from nbagent.dns.server import DnsFailed, Server
from nbagent.gateway.runtime import GatewayDown, HaproxyServer
from nbagent.gateway.settings import GatewaySettings

POLL_S = 2.0

Emit = Callable[..., None]


class Removal:
    """The hosts that HAProxy sees by `list_hosts`, and the server that has their records."""

    def __init__(
        self, found: GatewaySettings, key: Key, list_hosts: Callable[[], list[HaproxyServer]], emit: Emit
    ) -> None:
        self._server, self._domain = server_of(found, key)
        self._list_hosts, self._emit = list_hosts, emit
        self._rule = SilenceRule(found.dns.dead_after)
        self._kept: list[str] = []

    def step(self, now_s: float) -> None:
        """Remove the records of the hosts that are due. Raises no NbagentError."""
        try:
            down = {host.label: host.is_down for host in self._list_hosts()}
        except GatewayDown:
            self._rule.forget()
            return
        for label in self._rule.due(down, now_s):
            self._remove(label)
        if self._rule.kept != self._kept:
            self._kept = self._rule.kept
            if self._kept:
                self._emit(Event.DNS_HOSTS_KEPT, text=", ".join(self._kept))

    def _remove(self, label: str) -> None:
        place = Place(self._server.zone, self._domain, label)
        # The next attempt after a failure is after the same time, in which another gateway may succeed.
        self._rule.removed(label)
        try:
            if remove_host(self._server, place):
                self._emit(Event.DNS_HOST_REMOVED, name=place.host, wait_s=round(self._rule.after_s))
        except NbagentError as error:
            self._emit(Event.DNS_FAILED, name=place.host, wait_s=round(self._rule.after_s), text=str(error))


def require_settings(found: GatewaySettings) -> None:
    """Raises ConfigError if dns.server is not set."""
    if found.dns.server is None or found.dns.zone is None or found.fleet.srv is None:
        raise ConfigError(
            "dns.server: expected the DNS server from which the records of dead hosts are removed", key="dns.server",
            expected="a DNS server",
        )


def server_of(found: GatewaySettings, key: Key) -> tuple[Server, str]:
    """The server that has the records of hosts, and their domain. Raises ConfigError if dns.server is not set."""
    require_settings(found)
    assert found.dns.server is not None and found.dns.zone is not None and found.fleet.srv is not None
    return Server(found.dns.server, found.dns.zone, key), found.fleet.srv.split(".", 2)[2]


def remove_host(server: Server, place: Place) -> bool:
    """Remove the records of a host; False if there are none that a host has published. Raises DnsFailed."""
    seen = server.seen(place)
    if not seen.owners or not all(map(is_owner_text, seen.owners)):
        if seen.addresses or seen.offered:
            raise DnsFailed(f"records of {place.host} were not published by nbagent, and are left to the zone's owner")
        return False
    server.apply(tuple(remove(place, seen)))
    return True
