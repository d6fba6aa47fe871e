"""The slots' network, as the supervisor sees it: it decides, and asks the network service to do it.

The supervisor has no CAP_NET_ADMIN and needs none. A slot's interface is made when the slot
starts, where it costs nobody time, and leads nowhere until a claim opens it. A host that never
allowed a network never starts the service.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from nbagent.config.host_config import CurrentConfig, NetworkSettings
from nbagent.core import paths
from nbagent.core.errors import StartFailed
from nbagent.core.model import Slot
from nbagent.network import addresses, resolver
from nbagent.network.rules import RULES_PATH, Rules
from nbagent.sandbox.plan import INTERFACE
from nbagent.sandbox.spec import Uplink
from nbagent.systemd.bus import JobFailed, Systemd

INTERNET = "internet"
# The service answers in milliseconds; its first start may take seconds on a busy machine.
TIMEOUT_S = 20.0
# It may be restarted at any moment, and every request may be repeated.
TRIES = 3
_ANSWER_BYTES = 65536


class Network:
    """Interfaces of slots. Every call to the service raises StartFailed when it does not succeed."""

    def __init__(self, config: CurrentConfig, systemd: Systemd) -> None:
        self._config = config
        self._systemd = systemd
        # Somewhere: a supervisor that restarts does not give away again what was just given back.
        self._last = secrets.randbelow(self.settings.range4.num_addresses)
        self._set_up = asyncio.Lock()
        self._applied: NetworkSettings | None = None
        self._asked = ""

    @property
    def settings(self) -> NetworkSettings:
        """The settings in force; `set_up` applies changed ones before the next interface is made."""
        return self._config.value.network

    @property
    def allowed(self) -> bool:
        """Whether any claim may get a network."""
        return INTERNET in self.settings.allow

    async def set_up(self) -> None:
        """Brings the rules and the resolver up to date, where a network is allowed."""
        async with self._set_up:
            settings = self.settings
            if not self.allowed:
                return
            if settings != self._applied:
                _write(RULES_PATH, json.dumps(rules(settings).save()))
                await self._call("rules")
                self._applied = settings
            asked = resolver_text(settings)
            if asked != self._asked:
                try:
                    await self._systemd.start(resolver.UNIT, anew=_write(resolver.PATH, asked))
                except (OSError, JobFailed) as error:
                    raise StartFailed(f"{resolver.UNIT}: {error}", step="network") from error
                self._asked = asked

    def choose(self, taken: Container[str]) -> tuple[str, ...]:
        """Addresses for a new slot, not `taken` ones; none where no network is allowed. Raises StartFailed."""
        if not self.allowed:
            return ()
        range4 = self.settings.range4
        try:
            self._last = addresses.next_number(self._last, taken, range4)
        except LookupError as error:
            raise StartFailed(str(error), step="network") from None
        return numbered(self.settings, self._last)

    def uplink(self, slot: Slot) -> Uplink | None:
        """What a slot's own side of its interface needs."""
        return uplink(self.settings, slot)

    async def attach(self, slot: Slot, netns_fd: int) -> None:
        """Makes a slot's interface, closed, and puts its inner end into the slot's network namespace."""
        await self.set_up()
        await self._call(
            "attach", netns_fd,
            name=addresses.interface(slot.id), inner=INTERFACE, addresses=list(slot.addresses), rate=self.settings.down,
        )

    async def open(self, slot: Slot) -> None:
        """Opens a slot's interface."""
        await self._call("open", name=addresses.interface(slot.id))

    async def remove(self, slot: Slot) -> None:
        """Removes a slot's interface and what is remembered of it, if it ever had one."""
        if slot.addresses:
            await self._call("remove", name=addresses.interface(slot.id), addresses=list(slot.addresses))

    async def sweep(self, keep: Iterable[Slot]) -> None:
        """Removes every interface but those of `keep` that are open, or may be opened by a claim yet to come."""
        kept = [slot for slot in keep if slot.addresses and (slot.claimed_s is None or slot.network == INTERNET)]
        await self._call("sweep", keep=[addresses.interface(slot.id) for slot in kept])

    async def _call(self, op: str, *fds: int, **arguments: Any) -> None:
        request = json.dumps({"op": op, **arguments}).encode()
        answer: dict[str, Any] = {"error": "ended without an answer"}
        for _ in range(TRIES):
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    payload = await _ask(request, fds)
            except TimeoutError:
                answer = {"error": f"no answer within {TIMEOUT_S:g} s"}
                break
            except OSError as error:
                answer = {"error": str(error)}
                continue
            if payload:
                answer = json.loads(payload)
                break
        if "error" in answer:
            raise StartFailed(f"nbagent-network: {op}: {answer['error']}", step="network")


async def _ask(request: bytes, fds: tuple[int, ...]) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.setblocking(False)
        await loop.sock_connect(connection, str(paths.NETWORK_SOCKET))
        socket.send_fds(connection, [request], list(fds))
        return await loop.sock_recv(connection, _ANSWER_BYTES)


def numbered(settings: NetworkSettings, number: int) -> tuple[str, ...]:
    """The addresses of a number: of IPv4, and of IPv6 where the host has it."""
    version6 = (str(settings.range6[number]),) if addresses.forwards_ipv6() else ()
    return (str(settings.range4[number]), *version6)


def uplink(settings: NetworkSettings, slot: Slot) -> Uplink | None:
    """The inner side of the interface of a slot that has one."""
    if not slot.addresses:
        return None
    ranges = (settings.range4, settings.range6)
    gateways = [addresses.gateway(network) for network in ranges[:len(slot.addresses)]]
    return Uplink(list(slot.addresses), gateways, settings.up)


def rules(settings: NetworkSettings) -> Rules:
    """The rules that the settings mean."""
    return Rules(
        range4=settings.range4,
        range6=settings.range6,
        named=named(settings),
        closed=bool(settings.only),
        connections=settings.connections,
        connection_rate=settings.connection_rate,
    )


def resolver_text(settings: NetworkSettings) -> str:
    """The resolver's file, by the settings and by whom the host asks now."""
    names = [name for name in settings.only if isinstance(name, str)]
    hosts_own = resolver.HOSTS_OWN.read_text(errors="replace") if resolver.HOSTS_OWN.exists() else ""
    gateway = addresses.gateway(settings.range4)
    return resolver.render(gateway, names, resolver.upstreams(hosts_own), private=bool(named(settings)))


def named(settings: NetworkSettings) -> tuple[addresses.Network, ...]:
    """Ranges that the operator names: reached, also where they are private."""
    return (*settings.also, *(item for item in settings.only if not isinstance(item, str)))


def _write(path: Path, text: str) -> bool:
    """Writes a file whole or not at all; whether that changed it."""
    if path.exists() and path.read_text() == text:
        return False
    new = path.with_suffix(".new")
    new.write_text(text)
    os.chmod(new, 0o644)
    new.rename(path)
    return True
