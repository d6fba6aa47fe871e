# SPDX-License-Identifier: BSD-3-Clause
"""Lowers the CPU weight of slots that compute while no processor of the host is free (nbagent.policy.processors).

The guard reads the idle time of the host four times a second, and the processor time of slots only while no processor
was free lately, of those at rest once a second. It pauses fifty times as long as a sample takes, so that a thousand
slots cost at most two percent of a processor, and only while the host has none free.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping

from nbagent.config.host_config import CurrentConfig
from nbagent.core.events import Event, emit
from nbagent.core.model import SlotState, now
from nbagent.policy.processors import Processors
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.scope_limits import ScopeLimits
from nbagent.supervisor.slots import Slots

SAMPLE_INTERVAL_S = 0.25
PAUSE_PART = 50
# Between two journal entries about one slot, and between two attempts after systemd refused a change.
LOG_INTERVAL_S = 600.0
RETRY_S = 10.0
# Slots that are read in one turn of the event loop, which takes half a millisecond.
TURN = 50


def read_idle() -> float:
    """The idle time of all processors together since the boot, in seconds with two digits.

    /proc/stat has it too, but reading that counts the interrupts of every processor.
    """
    # Without a file object, which takes twice the time.
    fd = os.open("/proc/uptime", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return float(os.read(fd, 64).split()[1])
    finally:
        os.close(fd)


class ProcessorGuard:
    """The guard of one host. `idle` reads the idle time of the host."""

    def __init__(
        self, config: CurrentConfig, slots: Slots, limits: ScopeLimits, counters: Counters, processors: int,
        idle: Callable[[], float] = read_idle,
    ) -> None:
        self._config = config
        self._slots = slots
        self._limits = limits
        self._counters = counters
        self._policy = Processors(processors)
        self._read_idle = idle
        # The slots that give way, by id, and when the journal had an entry about a slot.
        self._giving: dict[str, RunningSlot] = {}
        self._logged_s: dict[str, float] = {}
        self._not_before_s = 0.0

    async def run(self) -> None:
        """Samples until cancelled."""
        while True:
            began_s = now()
            # Without a free descriptor, for example, the next sample decides.
            with contextlib.suppress(OSError):
                await self.sample()
            await asyncio.sleep(max(SAMPLE_INTERVAL_S, PAUSE_PART * (now() - began_s)))

    async def sample(self) -> None:
        """One sample: lowers and restores the weights that the policy decides."""
        part = self._config.value.slots.cpu_weight_busy
        self._giving = {name: live for name, live in self._giving.items() if _is_claimed(live)}
        if part < 1:
            lives = dict(self._giving)
            if self._policy.sample(now(), self._read_idle()):
                lives = {live.slot.id: live for live in self._slots.values() if _is_claimed(live)}
            due = self._policy.due(lives, self._giving)
            changes = self._policy.decide(await _used_s({name: lives[name] for name in due}), self._giving)
        else:
            lives, changes = self._giving, dict.fromkeys(self._giving, False)
        # After a reload with another part.
        anew = {name: True for name, live in self._giving.items() if live.lowered.cpu_part != part}
        if now() >= self._not_before_s:
            for name, gives_way in {**anew, **changes}.items():
                await self._set(lives[name], part if gives_way else 1.0)

    async def _set(self, live: RunningSlot, part: float) -> None:
        """Gives a slot this part of its weight."""
        if not _is_claimed(live):
            return
        slot = live.slot
        try:
            await self._limits.lower(live, cpu_part=part)
        except OSError as error:
            if _is_claimed(live):
                self._not_before_s = now() + RETRY_S
                emit(Event.SLOT_WEIGHT_KEPT, slot=slot.id, text=str(error))
            return
        if part == 1:
            self._giving.pop(slot.id, None)
            return
        if slot.id not in self._giving:
            self._counters.add("gave_way")
        self._giving[slot.id] = live
        self._log(live)

    def _log(self, live: RunningSlot) -> None:
        """Writes to the journal that a slot gives way, if there was no such entry about it lately."""
        at_s, slot = now(), live.slot
        since_s = at_s - LOG_INTERVAL_S
        self._logged_s = {name: logged_s for name, logged_s in self._logged_s.items() if logged_s > since_s}
        if slot.id not in self._logged_s:
            self._logged_s[slot.id] = at_s
            weight = live.limits_in_force.cpu_weight
            emit(Event.SLOT_GIVES_WAY, slot=slot.id, text=f"{weight} instead of {slot.limits.cpu_weight}")


def _is_claimed(live: RunningSlot) -> bool:
    return live.slot.state is SlotState.CLAIMED and live.cgroup is not None


async def _used_s(lives: Mapping[str, RunningSlot]) -> dict[str, float]:
    """The processor time of slots; other tasks run between TURN of them."""
    used_s = {}
    for number, (name, live) in enumerate(lives.items(), 1):
        if live.cgroup is not None:
            used_s[name] = live.cgroup.cpu_s()
        if number % TURN == 0:
            await asyncio.sleep(0)
    return used_s
