# SPDX-License-Identifier: BSD-3-Clause
"""The network interfaces of slots, for callers that go on when the network service fails."""

from __future__ import annotations

import contextlib
import math

from nbagent.core.errors import StartFailed
from nbagent.core.events import Event, emit
from nbagent.core.model import Slot
from nbagent.supervisor.network import Network
from nbagent.supervisor.slots import Slots

# Between two reviews: dnsmasq does not read changes of the host's resolv.conf itself if network.only has names, and the
# network service, if an operator stopped it, restores no change of the host.
REVIEW_S = 5.0


class Interfaces:
    """Sets up the network and removes interfaces; a failure is an event, because the next start or end tries again."""

    def __init__(self, network: Network, slots: Slots) -> None:
        self._network = network
        self._slots = slots
        self._next_s = 0.0
        self._under_review = False

    @property
    def allowed(self) -> bool:
        """Whether any claim may get a network."""
        return self._network.allowed

    async def set_up(self, *, sweep: bool = False) -> None:
        """Brings rules and resolver up to date; `sweep` also removes the interfaces of slots that have ended."""
        try:
            await self._network.set_up()
            if sweep:
                await self._network.sweep(live.slot for live in self._slots.values())
        except StartFailed as error:
            emit(Event.NETWORK_FAILED, text=str(error))

    @property
    def next_s(self) -> float:
        """The time of the next review."""
        return self._next_s if self.allowed else math.inf

    async def review(self, now_s: float) -> None:
        """Brings rules and resolver up to date. A failure is reported by the next start of a slot."""
        self._next_s = now_s + REVIEW_S
        if self._under_review:
            return
        self._under_review = True
        try:
            with contextlib.suppress(StartFailed):
                await self._network.set_up()
        finally:
            self._under_review = False

    async def remove(self, slot: Slot) -> None:
        """Removes the interface of a slot that has one."""
        try:
            await self._network.remove(slot)
        except StartFailed as error:
            emit(Event.NETWORK_FAILED, text=str(error))
