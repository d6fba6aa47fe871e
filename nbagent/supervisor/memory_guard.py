# SPDX-License-Identifier: BSD-3-Clause
"""Holds slots that grow while the host's memory runs out (nbagent.policy.memory_guard), and restores their limits.

With slots.overcommit = "auto" more users fit than their limits allow together. The guard reads the available memory of
the host twice a second, and the memory of the slots only while less is available than is kept for growing users.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable

from nbagent.config.host_config import CurrentConfig
from nbagent.core.events import Event, emit
from nbagent.core.model import SlotState, now
from nbagent.core.quantities import format_size
from nbagent.policy import admission
from nbagent.policy import memory_guard as policy
from nbagent.policy.memory_guard import Growth, HostMemory, SlotMemory
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.host_load import Memory, read_memory
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.slots import Slots
from nbagent.supervisor.systemd import Systemd

LOOK_S = 0.5


class MemoryGuard:
    """The guard of one host. `memory` reads the host's memory."""

    def __init__(
        self, config: CurrentConfig, slots: Slots, systemd: Systemd, counters: Counters,
        memory: Callable[[], Memory] = read_memory,
    ) -> None:
        self._config = config
        self._slots = slots
        self._systemd = systemd
        self._counters = counters
        self._read_memory = memory
        self._growth = Growth()
        # The limits at which slots are held, in bytes by id.
        self._held: dict[str, int] = {}
        self._before: tuple[float, int] | None = None

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """One look: sets the limits that the policy decides."""
        memory, at_s = self._read_memory(), now()
        before_s, before_bytes = self._before or (at_s - LOOK_S, memory.available_bytes)
        self._before = (at_s, memory.available_bytes)
        settings = self._config.value
        kept_bytes = settings.host.memory_reserve + admission.burst_bytes(memory.total_bytes, settings.slots.memory)
        self._held = {name: size for name, size in self._held.items() if name in self._slots}
        # Twice as much as is kept, so that the growth of slots is known when it matters.
        if memory.available_bytes > 2 * kept_bytes and not self._held:
            return
        decline_bytes_s = (before_bytes - memory.available_bytes) / max(at_s - before_s, LOOK_S / 10)
        host = HostMemory(memory.available_bytes, decline_bytes_s, settings.host.memory_reserve)
        lives = {live.slot.id: live for live in self._slots.values() if _may_be_held(live)}
        used = {name: live.cgroup.memory_bytes() for name, live in lives.items() if live.cgroup is not None}
        grown = self._growth.grown(at_s, used)
        looks = {
            name: SlotMemory(size, grown[name], lives[name].slot.limits.memory_bytes, self._held.get(name))
            for name, size in used.items()
        }
        for name, limit_bytes in policy.decide(host, looks).items():
            await self._set(lives[name], limit_bytes, memory.available_bytes)

    async def _set(self, live: RunningSlot, limit_bytes: int | None, available_bytes: int) -> None:
        slot = live.slot
        if slot.id not in self._slots:
            return
        limits = slot.limits if limit_bytes is None else dataclasses.replace(slot.limits, memory_bytes=limit_bytes)
        try:
            await self._systemd.set_limits(slot.scope, limits)
        except OSError as error:
            emit(Event.SLOT_NOT_HELD, slot=slot.id, text=str(error))
            return
        if limit_bytes is None:
            self._held.pop(slot.id, None)
            emit(Event.SLOT_FREED, slot=slot.id, text=format_size(slot.limits.memory_bytes))
        else:
            self._held[slot.id] = limit_bytes
            self._counters.add("held")
            own, available = format_size(slot.limits.memory_bytes), format_size(available_bytes)
            text = f"{format_size(limit_bytes)} instead of {own}, because the host has only {available} available"
            emit(Event.SLOT_HELD, slot=slot.id, text=text)


def _may_be_held(live: RunningSlot) -> bool:
    return live.slot.state in (SlotState.PREPARING, SlotState.CLAIMED) and live.cgroup is not None
