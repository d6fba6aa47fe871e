# SPDX-License-Identifier: BSD-3-Clause
"""The start of the supervisor: it adopts the slots that outlived the former one, and removes incomplete ones."""

from __future__ import annotations

import dataclasses

from nbagent.core.events import Event, emit
from nbagent.core.model import Limits, Lowered, Slot, SlotState, now
from nbagent.supervisor.compressor import Compressor
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.crash_points import Point, reach
from nbagent.supervisor.interfaces import Interfaces
from nbagent.supervisor.lending import Lending
from nbagent.supervisor.monitor import Monitor
from nbagent.supervisor.pools import Pools
from nbagent.supervisor.records import Records
from nbagent.supervisor.running_slot import RunningSlot, reattach
from nbagent.supervisor.sessions import Sessions
from nbagent.supervisor.slots import Slots
from nbagent.supervisor.systemd import Systemd
from nbagent.supervisor.tasks import Tasks

COMPLETE = (SlotState.WARM, SlotState.CLAIMED)


class Adoption:
    """Adopts slots, once, before the first claim."""

    def __init__(
        self, slots: Slots, pools: Pools, records: Records, systemd: Systemd, monitor: Monitor, compressor: Compressor,
        interfaces: Interfaces, counters: Counters, sessions: Sessions, lending: Lending, tasks: Tasks,
    ) -> None:
        self._slots = slots
        self._pools = pools
        self._records = records
        self._systemd = systemd
        self._monitor = monitor
        self._compressor = compressor
        self._interfaces = interfaces
        self._counters = counters
        self._sessions = sessions
        self._lending = lending
        self._tasks = tasks

    async def run(self) -> int:
        """Adopts every complete slot that runs, and removes all other files and scopes. Returns the number of slots."""
        scopes, has_interfaces = set(await self._systemd.scopes()), self._interfaces.allowed
        for name, slot in list(self._records.load()):
            scope = f"nbagent-{name}.scope"
            has_interfaces |= slot is not None and bool(slot.addresses)
            runs = scope in scopes
            scopes.discard(scope)
            live = await reattach(slot) if slot is not None and slot.state in COMPLETE and runs else None
            if live is not None:
                await self._adopt(live)
                reach(Point.SLOT_ADOPTED)
                continue
            await self._systemd.stop(scope, at_once=True)
            self._records.remove(name)
            self._counters.add("removed")
            emit(Event.SLOT_REMOVED, slot=name, text=_refusal(slot))
        for scope in scopes:
            await self._systemd.stop(scope, at_once=True)
            name = scope.removeprefix("nbagent-").removesuffix(".scope")
            emit(Event.SLOT_REMOVED, slot=name, text=f"{scope} has no slot.json")
        self._sessions.open({name: live.slot for name, live in self._slots.items()})
        self._lending.adopt()
        if has_interfaces:
            self._tasks.spawn(self._interfaces.set_up(sweep=True))
        return len(self._slots)

    async def _adopt(self, live: RunningSlot) -> None:
        await self._apply_limits(live.slot)
        live.limit_files = self._records.limit_files(live.slot)
        live.publish(live.slot.limits)
        self._slots.add(live)
        self._monitor.watch(live)
        self._pools.adopt(live)
        self._monitor.add(live, now())
        await self._compressor.adopt(live)
        self._counters.add("adopted")
        emit(Event.SLOT_ADOPTED, slot=live.slot.id, state=live.slot.state.value)

    async def _apply_limits(self, slot: Slot) -> None:
        """Gives a scope the limits of its record, after which the former supervisor ended or lowered some."""
        try:
            found = await self._systemd.scope_limits(slot.scope)
            if changes := _changes(found, slot.limits):
                await self._systemd.set_limits(slot.scope, slot.limits)
                event = Event.SLOT_LIMITS_RESTORED if _is_lowered(found, slot.limits) else Event.SLOT_LIMITS_MENDED
                emit(event, slot=slot.id, text=", ".join(changes))
        except OSError as error:
            emit(Event.SLOT_LIMITS_MENDED, slot=slot.id, text=f"not possible: {error}")


def _changes(found: Limits, recorded: Limits) -> list[str]:
    """The limits that differ; systemd has microseconds of processor time in a second."""
    quota = recorded.cpu_quota
    after = dataclasses.replace(recorded, cpu_quota=None if quota is None else round(quota, 6)).document()
    before = found.document()
    return [f"{name} from {before[name]} to {after[name]}" for name in after if before[name] != after[name]]


def _is_lowered(found: Limits, own: Limits) -> bool:
    """Whether a guard of the former supervisor can have lowered limits to those that were found."""
    lowered = Lowered(found.memory_bytes, min(1.0, found.cpu_weight / own.cpu_weight))
    return not _changes(found, lowered.of(own))


def _refusal(slot: Slot | None) -> str:
    """The reason why a slot that was found is not adopted."""
    if slot is None:
        return "slot.json is missing or broken"
    if slot.state in COMPLETE:
        return "its processes ended while no supervisor ran"
    return f"incomplete: its state is {slot.state.value}"
