# SPDX-License-Identifier: BSD-3-Clause
"""The records of a host, and the change that follows from its state and from the records that exist. Without I/O.

A host has three kinds of records in one zone:

    _nbagent._tcp.DOMAIN   SRV 0 0 8000 LABEL.DOMAIN   gateways send claims to the host
    LABEL.DOMAIN           A and AAAA                  gateways send the host's users to it
    LABEL.DOMAIN           TXT "nbagent host=…"        the machine that owns the name

A host that drains or fails keeps its addresses, because its users reach it by them, and loses the SRV record.

The owner is a hash of the machine's id. A change is one message of RFC 2136, which the server applies completely or
not at all, and its prerequisites are the records that the change was decided on. So two hosts with the same label
cannot both get it, even if they publish at the same time: the second message is refused.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from nbagent.core.errors import NbagentError

# The port of the router of a host that is found by DNS (nbagent.gateway.haproxy).
ROUTER_PORT = 8000
_OWNER_PREFIX = "nbagent host="
_PURPOSE = b"nbagent dns owner"


class LabelTaken(NbagentError):
    """The name of the host belongs to another machine."""

    code = "label-taken"
    title = "The label is in use"


class Agent(enum.Enum):
    """The state of the agent as /readyz reports it; a full host is ready, because the agent-check has its weight."""

    READY = "ready"
    DRAINING = "draining"
    FAILING = "failing"


class Presence(enum.Enum):
    """The records that a host should have."""

    OFFERED = "offered"      # all
    REACHABLE = "reachable"  # no SRV record; addresses if they exist
    GONE = "gone"            # none


@dataclass(frozen=True)
class Place:
    """The names of a host's records. All of them are in `zone`."""

    zone: str
    domain: str
    label: str

    @property
    def host(self) -> str:
        """The name with the addresses."""
        return f"{self.label}.{self.domain}"

    @property
    def service(self) -> str:
        """The name with the SRV records of all hosts."""
        return f"_nbagent._tcp.{self.domain}"

    @property
    def offer(self) -> str:
        """The data of the host's SRV record."""
        return f"0 0 {ROUTER_PORT} {self.host}."


@dataclass(frozen=True)
class Own:
    """The host's own records: its addresses, the owner's text, and the time to live."""

    place: Place
    addresses: frozenset[str]
    owner: str
    ttl: int


@dataclass(frozen=True)
class Seen:
    """The records that the server has. `owners` are the TXT records at the host's name."""

    addresses: frozenset[str] = frozenset()
    owners: frozenset[str] = frozenset()
    offered: bool = False
    ttl: int | None = None


class Step(NamedTuple):
    """A prerequisite (`absent`, `present`) or a part (`delete`, `add`) of an update. Empty data: all of the type."""

    verb: str
    name: str
    kind: str
    data: tuple[str, ...] = ()
    ttl: int = 0


Change = tuple[Step, ...]


def owner_text(machine_id: str) -> str:
    """The TXT record of a machine. The machine's id is confidential (machine-id(5)), so a keyed hash is published."""
    return _OWNER_PREFIX + hmac.new(machine_id.strip().encode(), _PURPOSE, hashlib.sha256).hexdigest()[:32]


def is_owner_text(text: str) -> bool:
    """Whether a TXT record is one that a host has published."""
    return text.startswith(_OWNER_PREFIX)


def decide(own: Own, seen: Seen, presence: Presence, published: frozenset[str] | None) -> Change:
    """The change to `seen`; empty if there is nothing to do. Raises LabelTaken.

    `published` are the addresses that this process has published or found before, None if it has not.
    """
    # A copy of this machine has the same owner and other addresses.
    is_own = seen.owners == {own.owner} and seen.addresses <= own.addresses | (published or frozenset())
    if presence is Presence.GONE:
        return tuple(remove(own.place, seen)) if is_own else ()
    if presence is Presence.REACHABLE:
        withdrawn = _withdraw_offer(own.place, seen)
        return tuple(_prerequisites(own.place, seen) + withdrawn) if withdrawn and is_own else ()
    _check_owner(own, seen, published)
    steps = []
    if seen.addresses != own.addresses or seen.owners != {own.owner} or seen.ttl != own.ttl:
        steps += _replace(own)
    if not seen.offered:
        steps.append(Step("add", own.place.service, "SRV", (own.place.offer,), own.ttl))
    return tuple(_prerequisites(own.place, seen) + steps) if steps else ()


def remove(place: Place, seen: Seen) -> Iterator[Step]:
    """The change that removes all records of a host, if they are still those of `seen`."""
    if seen.addresses or seen.owners or seen.offered:
        yield from _prerequisites(place, seen)
        yield from (Step("delete", place.host, kind) for kind in ("A", "AAAA", "TXT"))
        yield from _withdraw_offer(place, seen)


def permissions(place: Place) -> Change:
    """A change without effect that needs every permission of publishing: it deletes records that never exist."""
    return (
        Step("delete", place.host, "A", ("0.0.0.0",)),
        Step("delete", place.host, "AAAA", ("::",)),
        Step("delete", place.host, "TXT", ("nbagent dns check",)),
        Step("delete", place.service, "SRV", (f"0 0 0 nbagent-dns-check.{place.domain}.",)),
    )


def _check_owner(own: Own, seen: Seen, published: frozenset[str] | None) -> None:
    """Raises LabelTaken if another machine has the name.

    A machine that was installed again has another id and the same addresses, which no other machine can have.
    """
    where = f"{own.place.host} ({', '.join(sorted(seen.addresses)) or 'no address'})"
    mend = (
        "give this host another host.label, or if the other host is gone for good, run: "
        f"nbagent dns withdraw --label {own.place.label}"
    )
    if seen.owners == {own.owner}:
        if published is not None and seen.addresses and seen.addresses not in (published, own.addresses):
            raise LabelTaken(
                f"{where} was published by another machine with the same /etc/machine-id and label, probably a copy of "
                "this one: remove /etc/machine-id on one of them, run systemd-machine-id-setup, and set host.label"
            )
    elif seen.owners and seen.addresses != own.addresses:
        raise LabelTaken(f"{where} belongs to another machine: {mend}")
    elif seen.addresses and seen.addresses != own.addresses:
        raise LabelTaken(f"{where} was not published by nbagent: remove these records, or {mend.partition(',')[0]}")


def _prerequisites(place: Place, seen: Seen) -> list[Step]:
    """Steps that the server refuses if the records of the host's name are no longer those of `seen`."""
    steps = []
    for kind in ("A", "AAAA"):
        addresses = tuple(sorted(address for address in seen.addresses if kind_of(address) == kind))
        steps.append(Step("present" if addresses else "absent", place.host, kind, addresses))
    owners = tuple(sorted(seen.owners))
    steps.append(Step("present" if owners else "absent", place.host, "TXT", owners))
    return steps


def _replace(own: Own) -> list[Step]:
    steps = [Step("delete", own.place.host, kind) for kind in ("A", "AAAA", "TXT")]
    steps += [
        Step("add", own.place.host, kind_of(address), (address,), own.ttl) for address in sorted(own.addresses)
    ]
    return [*steps, Step("add", own.place.host, "TXT", (own.owner,), own.ttl)]


def _withdraw_offer(place: Place, seen: Seen) -> list[Step]:
    return [Step("delete", place.service, "SRV", (place.offer,))] if seen.offered else []


def kind_of(address: str) -> str:
    """The type of the record of an address."""
    return "AAAA" if ipaddress.ip_address(address).version == 6 else "A"


class PresenceRule:
    """The presence that follows from the states of the agent.

    A drain takes effect at once. A failure takes effect after `failing_s`, because a restart and an upgrade of the
    agent take seconds, in which claims wait in the backlogs of its sockets.
    """

    def __init__(self, failing_s: float) -> None:
        self.failing_s = failing_s
        self._failing_since_s: float | None = None
        self._presence: Presence | None = None

    def update(self, agent: Agent, now_s: float) -> Presence | None:
        """The presence at `now_s`; None while it is not known, after the start of the process."""
        if agent is not Agent.FAILING:
            self._failing_since_s = None
            self._presence = Presence.OFFERED if agent is Agent.READY else Presence.REACHABLE
            return self._presence
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        if now_s - self._failing_since_s >= self.failing_s:
            self._presence = Presence.REACHABLE
        return self._presence


class SilenceRule:
    """The hosts whose records a gateway removes: those that have been down for `after_s` without a break.

    A gateway that has lost its network sees all hosts down, so nothing is removed while fewer than half of the hosts
    respond. A host whose records are removed wrongly publishes them again within seconds, and is then due after
    `after_s` again.
    """

    def __init__(self, after_s: float) -> None:
        self.after_s = after_s
        self._down_since_s: dict[str, float] = {}
        self.kept: list[str] = []

    def due(self, down: dict[str, bool], now_s: float) -> list[str]:
        """The labels that are due; `down` has all hosts. `kept` has those that are only kept by the half."""
        self._down_since_s = {
            label: self._down_since_s.get(label, now_s) for label, is_down in down.items() if is_down
        }
        due = sorted(label for label, since_s in self._down_since_s.items() if now_s - since_s >= self.after_s)
        self.kept = []
        if 2 * len(self._down_since_s) > len(down):
            self.kept, due = due, []
        return due

    def removed(self, label: str) -> None:
        """To be called after the removal of a host's records, or a failure of it."""
        self._down_since_s.pop(label, None)

    def forget(self) -> None:
        """To be called when the states of the hosts are not known."""
        self._down_since_s, self.kept = {}, []
