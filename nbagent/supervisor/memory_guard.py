# SPDX-License-Identifier: BSD-3-Clause
"""Holds slots that grow while the host's memory runs out (nbagent.policy.memory_guard), and restores their limits.

With slots.overcommit = "auto" more users fit than their limits allow together. The guard reads the available memory of
the host twice a second, and the memory of the slots only while less is available than is kept for growing users.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from nbagent.supervisor.scope_limits import ScopeLimits
from nbagent.supervisor.slots import Slots

SAMPLE_INTERVAL_S = 0.5


class MemoryGuard:
    """The guard of one host. `memory` reads the host's memory."""

    def __init__(
        self, config: CurrentConfig, slots: Slots, limits: ScopeLimits, counters: Counters,
        memory: Callable[[], Memory] = read_memory,
    ) -> None:
        self._config = config
        self._slots = slots
        self._limits = limits
        self._counters = counters
        self._read_memory = memory
        self._growth = Growth()
        # The ids of the slots that are held.
        self._held: set[str] = set()
        self._before: tuple[float, int] | None = None

    async def run(self) -> None:
        """Samples until cancelled."""
        while True:
            await asyncio.sleep(SAMPLE_INTERVAL_S)
            # Without a free descriptor, for example, the next sample decides.
            with contextlib.suppress(OSError):
                await self.sample()

    async def sample(self) -> None:
        """One sample: sets the limits that the policy decides."""
        memory, at_s = self._read_memory(), now()
        before_s, before_bytes = self._before or (at_s - SAMPLE_INTERVAL_S, memory.available_bytes)
        self._before = (at_s, memory.available_bytes)
        settings = self._config.value
        kept_bytes = settings.host.memory_reserve + admission.burst_bytes(memory.total_bytes, settings.slots.memory)
        self._held = {name for name in self._held if name in self._slots}
        # Twice as much as is kept, so that the growth of slots is known when it matters.
        if memory.available_bytes > 2 * kept_bytes and not self._held:
            return
        decline_bytes_s = (before_bytes - memory.available_bytes) / max(at_s - before_s, SAMPLE_INTERVAL_S / 10)
        host = HostMemory(memory.available_bytes, decline_bytes_s, settings.host.memory_reserve)
        lives = {live.slot.id: live for live in self._slots.values() if _may_be_held(live)}
        used = {name: live.cgroup.memory_bytes() for name, live in lives.items() if live.cgroup is not None}
        grown = self._growth.grown(at_s, used)
        samples = {
            name: SlotMemory(size, grown[name], lives[name].slot.limits.memory_bytes, lives[name].lowered.memory_bytes)
            for name, size in used.items()
        }
        for name, limit_bytes in policy.decide(host, samples).items():
            await self._set(lives[name], limit_bytes, memory.available_bytes)

    async def _set(self, live: RunningSlot, limit_bytes: int | None, available_bytes: int) -> None:
        if not _may_be_held(live):
            return
        try:
            await self._limits.lower(live, memory_bytes=limit_bytes)
        except OSError as error:
            if _may_be_held(live):
                emit(Event.SLOT_NOT_HELD, slot=live.slot.id, text=str(error))
            return
        slot = live.slot
        if limit_bytes is None:
            self._held.discard(slot.id)
            emit(Event.SLOT_FREED, slot=slot.id, text=format_size(slot.limits.memory_bytes))
        else:
            self._held.add(slot.id)
            self._counters.add("held")
            own, available = format_size(slot.limits.memory_bytes), format_size(available_bytes)
            text = f"{format_size(limit_bytes)} instead of {own}, because the host has only {available} available"
            emit(Event.SLOT_HELD, slot=slot.id, text=text)


def _may_be_held(live: RunningSlot) -> bool:
    return live.slot.state in (SlotState.PREPARING, SlotState.CLAIMED) and live.cgroup is not None
