# SPDX-License-Identifier: BSD-3-Clause
"""The loop of nbagent-dns-update.service: publishes the records of this host, and withdraws them.

The state of the agent is polled at /readyz, and the records are compared with the server's at every change of the
state and every VERIFY_S, so that records that another program has removed come back. A change that fails is tried
again. Each cause of a failure is in the journal once, and again after REPEAT_S.

A restart of the service leaves the records as they are, because resolvers would remember their absence; a stop, which
includes that of the host, withdraws them. The unit's ExecStop= sends SIGUSR1 when it is no restart.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from nbagent.config.host_config import HostConfig
from nbagent.core.errors import ConfigError, NbagentError
from nbagent.core.events import Event
from nbagent.dns.key import Key
from nbagent.dns.records import (
    Agent,
    Change,
    LabelTaken,
    Own,
    Place,
    Presence,
    PresenceRule,
    Seen,
    decide,
    owner_text,
)
from nbagent.dns.server import DnsFailed, Server

UNIT = "nbagent-dns-update.service"
API = "http://127.0.0.1:9000"
MACHINE_ID = Path("/etc/machine-id")
POLL_S = 1.0
VERIFY_S = 10.0
FAILING_S = 10.0
RETRY_MAX_S = 30.0
REPEAT_S = 3600.0
_API_TIMEOUT_S = 3.0
_RESPONSE_MAX_BYTES = 1 << 16

Emit = Callable[..., None]


def place_of(config: HostConfig) -> Place:
    """The names of the host's records. Raises ConfigError if the host publishes none."""
    if config.dns.server is None or config.dns.zone is None:
        raise ConfigError(
            "dns.server: expected the DNS server that gets this host's records", key="dns.server",
            expected="a DNS server",
        )
    return Place(config.dns.zone, config.dns.domain or config.dns.zone, config.label)


class Registry:
    """The records of this host, and the server that has them."""

    def __init__(self, config: HostConfig, key: Key, machine_id: str) -> None:
        self.place = place_of(config)
        assert config.dns.server is not None
        self.server = Server(config.dns.server, self.place.zone, key)
        self._settings = config.dns
        self._owner = owner_text(machine_id)
        self.published: frozenset[str] | None = None

    def own(self) -> Own:
        """The records that the host publishes. Raises DnsFailed."""
        addresses = self._settings.addresses
        found = frozenset(addresses) if addresses else frozenset([self.server.local_address()])
        return Own(self.place, found, self._owner, self._settings.ttl)

    def reconcile(self, presence: Presence) -> tuple[Change, Seen]:
        """Make the server's records those of `presence`; the change, and the records before it.

        Raises DnsFailed, LabelTaken.
        """
        own, seen = self.own(), self.server.seen(self.place)
        change = decide(own, seen, presence, self.published)
        if change:
            self.server.apply(change)
        if presence is Presence.OFFERED:
            self.published = own.addresses
        elif presence is Presence.GONE and change:
            self.published = None
        return change, seen


class Publisher:
    """Follows the state of the agent; `step` is called every POLL_S. It raises no NbagentError."""

    def __init__(self, registry: Registry, agent: Callable[[], Agent], emit: Emit) -> None:
        self._registry, self._agent, self._emit = registry, agent, emit
        self._rule = PresenceRule(FAILING_S)
        self._done: Presence | None = None
        self._due_s = 0.0
        self._failures = 0
        self._reported: tuple[str, float] | None = None
        self.status = "waits for the agent"

    def step(self, now_s: float) -> None:
        """Poll the agent, and change the records if that is due."""
        presence = self._rule.update(self._agent(), now_s)
        if presence is None or (presence is self._done and now_s < self._due_s):
            return
        if self._failures and now_s < self._due_s:
            return
        self._change(presence, now_s)

    def stop(self, is_final: bool, now_s: float) -> None:
        """Withdraw the records if the service is stopped, and not restarted."""
        if is_final:
            self._change(Presence.GONE, now_s)

    def _change(self, presence: Presence, now_s: float) -> None:
        name = self._registry.place.host
        try:
            change, seen = self._registry.reconcile(presence)
        except (DnsFailed, LabelTaken) as error:
            self._failed(error, now_s)
            return
        if change:
            self._report(name, presence, seen)
        self.status = f"{name}: {presence.value}"
        self._done, self._due_s, self._failures, self._reported = presence, now_s + VERIFY_S, 0, None

    def _report(self, name: str, presence: Presence, seen: Seen) -> None:
        shown = ", ".join(sorted(self._registry.published or ())) or "none"
        if presence is Presence.OFFERED:
            again = self._done is Presence.OFFERED
            self._emit(Event.DNS_RESTORED if again else Event.DNS_PUBLISHED, name=name, text=shown)
        elif presence is Presence.REACHABLE:
            self._emit(Event.DNS_WITHDRAWN, name=name, text="no more claims; users still reach the host")
        else:
            self._emit(Event.DNS_WITHDRAWN, name=name, text=f"{', '.join(sorted(seen.addresses))} removed")

    def _failed(self, error: NbagentError, now_s: float) -> None:
        wait_s = min(RETRY_MAX_S, POLL_S * 2 ** min(self._failures, 10))
        self._failures += 1
        self._due_s = now_s + wait_s
        text = str(error)
        self.status = text
        if self._reported is None or self._reported[0] != text or now_s >= self._reported[1] + REPEAT_S:
            self._emit(Event.DNS_FAILED, name=self._registry.place.host, wait_s=round(wait_s), text=text)
            self._reported = (text, now_s)


def agent_state(url: str = API) -> Agent:
    """The state of the agent by /readyz."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_API_TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        if response.status == 200:
            return Agent.READY
        kind = json.loads(response.read(_RESPONSE_MAX_BYTES))["type"]
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
        return Agent.FAILING
    finally:
        connection.close()
    states = {"urn:nbagent:problem:full": Agent.READY, "urn:nbagent:problem:draining": Agent.DRAINING}
    return states.get(kind, Agent.FAILING)
