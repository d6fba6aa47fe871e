# SPDX-License-Identifier: BSD-3-Clause
"""The network interfaces of slots, for callers that go on when the network service fails."""

from __future__ import annotations

from nbagent.core.errors import StartFailed
from nbagent.core.events import Event, emit
from nbagent.core.model import Slot
from nbagent.supervisor.network import Network
from nbagent.supervisor.slots import Slots


class Interfaces:
    """Sets up the network and removes interfaces; a failure is an event, because the next start or end tries again."""

    def __init__(self, network: Network, slots: Slots) -> None:
        self._network = network
        self._slots = slots

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

    async def remove(self, slot: Slot) -> None:
        """Removes the interface of a slot that has one."""
        try:
            await self._network.remove(slot)
        except StartFailed as error:
            emit(Event.NETWORK_FAILED, text=str(error))
