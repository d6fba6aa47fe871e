# SPDX-License-Identifier: BSD-3-Clause
"""The slots' network: the supervisor decides, and the network service (nbagent.network) makes the changes.

So the supervisor needs no CAP_NET_ADMIN. A slot's interface is made when the slot starts, so that it costs no claim
time, and forwards nothing until a claim opens it. The service never starts on a host whose configuration allows no
network.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from nbagent.config.host_config import CurrentConfig, NetworkSettings
from nbagent.core import paths, proxies
from nbagent.core.errors import StartFailed
from nbagent.core.model import Slot
from nbagent.network import addresses, resolver
from nbagent.network.rules import RULES_PATH, Rules
from nbagent.sandbox.plan import INTERFACE
from nbagent.sandbox.spec import Uplink
from nbagent.supervisor.systemd import JobFailed, Systemd
from nbagent.wire import fields
from nbagent.wire.aio import receive
from nbagent.wire.channel import Channel, Message
from nbagent.wire.failure import Failure, StepFailed
from nbagent.wire.fields import MalformedMessage

INTERNET = "internet"
# The service responds in milliseconds; its first start may take seconds on a busy machine.
TIMEOUT_S = 20.0
# The service may be restarted at any moment, and every request may be repeated.
TRIES = 3


class Network:
    """Interfaces of slots. Every call to the service raises StartFailed when it fails."""

    def __init__(self, config: CurrentConfig, systemd: Systemd) -> None:
        self._config = config
        self._systemd = systemd
        # A random start, so that a restarted supervisor does not reuse addresses that were just released.
        self._last = secrets.randbelow(self.settings.range4.num_addresses)
        self._set_up = asyncio.Lock()
        self._applied: NetworkSettings | None = None
        self._resolver_text = ""

    @property
    def settings(self) -> NetworkSettings:
        """The settings in force; `set_up` applies changed ones before the next interface is made."""
        return self._config.value.network

    @property
    def allowed(self) -> bool:
        """Whether any claim may get a network."""
        return INTERNET in self.settings.allow

    async def set_up(self) -> None:
        """Brings the rules and the resolver up to date, where a network is allowed. Raises StartFailed."""
        async with self._set_up:
            settings = self.settings
            if not self.allowed:
                return
            if settings != self._applied:
                try:
                    _write(RULES_PATH, json.dumps(rules(settings).save()))
                except OSError as error:
                    text = f"{RULES_PATH} was not written: {error.strerror}"
                    raise StartFailed(text, step="network", errno=error.errno) from error
                await self._call("rules")
                self._applied = settings
            text = resolver_text(settings, fields.text(await self._call("host"), "resolver"))
            if text != self._resolver_text:
                try:
                    await self._systemd.start(resolver.UNIT, anew=_write(resolver.PATH, text))
                except (OSError, JobFailed) as error:
                    raise StartFailed(f"{resolver.UNIT}: {error}", step="network") from error
                self._resolver_text = text

    async def check(self) -> None:
        """Lets the service repair what other programs have changed, where a network is allowed.

        Raises StartFailed while that is not possible.
        """
        if self.allowed:
            await self._call("check")

    async def choose(self, taken: Container[str]) -> tuple[str, ...]:
        """Addresses for a new slot, none of them in `taken`; empty where no network is allowed. Raises StartFailed.

        The caller has to take them at once: no other task runs after the choice.
        """
        if not self.allowed:
            return ()
        # The supervisor is in a network namespace of its own, so that it cannot read the settings of the host's.
        forwards_ipv6 = (await self._call("host")).get("ipv6") is True
        range4 = self.settings.range4
        try:
            self._last = addresses.next_number(self._last, taken, range4)
        except LookupError as error:
            raise StartFailed(str(error), step="network") from None
        return numbered(self.settings, self._last, forwards_ipv6)

    def uplink(self, slot: Slot) -> Uplink | None:
        """The inner side of a slot's interface, None for a slot without one."""
        return uplink(self.settings, slot)

    def variables(self, slot: Slot) -> dict[str, str]:
        """The environment variables of the HTTP proxy, for a slot with an interface."""
        return variables(self.settings, slot)

    async def attach(self, slot: Slot, netns_fd: int) -> None:
        """Makes a slot's interface, closed, and puts its inner end into the slot's network namespace."""
        await self.set_up()
        await self._call(
            "attach", {"netns": netns_fd},
            name=addresses.interface(slot.id), inner=INTERFACE, addresses=list(slot.addresses), rate=self.settings.down,
        )

    async def open(self, slot: Slot) -> None:
        """Opens a slot's interface."""
        await self._call("open", name=addresses.interface(slot.id))

    async def remove(self, slot: Slot) -> None:
        """Removes a slot's interface and its entries in the firewall's sets, if it has addresses."""
        if slot.addresses:
            await self._call("remove", name=addresses.interface(slot.id), addresses=list(slot.addresses))

    async def sweep(self, keep: Iterable[Slot]) -> None:
        """Removes every interface but those of `keep` that are open, or that a later claim may open."""
        kept = [slot for slot in keep if slot.addresses and (slot.claimed_s is None or slot.network == INTERNET)]
        await self._call("sweep", keep=[addresses.interface(slot.id) for slot in kept])

    async def _call(
        self, op: str, fds: Mapping[str, int] = MappingProxyType({}), **arguments: object
    ) -> Mapping[str, object]:
        failure = Failure("network", 0, "nbagent-network.service ended without a response")
        for _ in range(TRIES):
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    response = await _request({"op": op, **arguments}, fds)
                if response is not None:
                    with response:
                        response.raise_failure()
                        return response.body
            except TimeoutError:
                failure = Failure("network", 0, f"no response within {TIMEOUT_S:g} s")
                break
            except OSError as error:
                failure = Failure.of(error, "network")
            except (StepFailed, MalformedMessage) as error:
                failure = Failure.of(error, "network")
                break
        raise StartFailed(f"nbagent-network: {op}: {failure.text}", step="network", errno=failure.errno)


async def _request(request: Mapping[str, object], fds: Mapping[str, int]) -> Message | None:
    with Channel.unconnected() as channel:
        channel.socket.setblocking(False)
        await asyncio.get_running_loop().sock_connect(channel.socket, str(paths.NETWORK_SOCKET))
        channel.send(request, fds)
        return await receive(channel)


def numbered(settings: NetworkSettings, number: int, forwards_ipv6: bool) -> tuple[str, ...]:
    """The addresses of a number: one of IPv4, and one of IPv6 where the host forwards it."""
    version6 = (str(settings.range6[number]),) if forwards_ipv6 else ()
    return (str(settings.range4[number]), *version6)


def uplink(settings: NetworkSettings, slot: Slot) -> Uplink | None:
    """The inner side of a slot's interface, None for a slot without one."""
    if not slot.addresses:
        return None
    ranges = (settings.range4, settings.range6)
    gateways = [addresses.gateway(network) for network in ranges[:len(slot.addresses)]]
    return Uplink(list(slot.addresses), gateways, settings.up)


def rules(settings: NetworkSettings) -> Rules:
    """The firewall rules of the settings."""
    return Rules(
        range4=settings.range4,
        range6=settings.range6,
        named=named(settings),
        closed=bool(settings.only),
        connections=settings.connections,
        connection_rate=settings.connection_rate,
        proxy=settings.proxy,
    )


def variables(settings: NetworkSettings, slot: Slot) -> dict[str, str]:
    """The environment variables of the HTTP proxy, for a slot with an interface."""
    if settings.proxy is None or not slot.addresses:
        return {}
    # Programs of a slot connect to each other by its name and addresses, too, which the proxy does not reach.
    return proxies.variables(settings.proxy, (slot.id, *slot.addresses, *direct(settings)))


def direct(settings: NetworkSettings) -> list[str]:
    """The networks that slots reach without the HTTP proxy."""
    return [str(network) for network in settings.also]


def resolver_text(settings: NetworkSettings, hosts_own: str) -> str:
    """The resolver's configuration file, from the settings and the host's own resolv.conf."""
    names = [name for name in settings.only if isinstance(name, str)]
    gateway = addresses.gateway(settings.range4)
    return resolver.render(gateway, names, resolver.upstreams(hosts_own), private=bool(named(settings)))


def named(settings: NetworkSettings) -> tuple[addresses.Network, ...]:
    """Ranges that the operator named, which slots reach even where they are private."""
    return (*settings.also, *(item for item in settings.only if not isinstance(item, str)))


def _write(path: Path, text: str) -> bool:
    """Replaces a file atomically; returns whether its content changed."""
    if path.exists() and path.read_text() == text:
        return False
    new = path.with_suffix(".new")
    new.write_text(text)
    os.chmod(new, 0o644)
    new.rename(path)
    return True
