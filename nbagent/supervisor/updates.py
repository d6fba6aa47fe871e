# SPDX-License-Identifier: BSD-3-Clause
"""Changes of a claimed slot: its limits, and its life counted from now."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Mapping

from nbagent.config.host_config import CurrentConfig
from nbagent.core.errors import IllegalMove, InvalidField, RecordFailed
from nbagent.core.events import Event, emit
from nbagent.core.model import UPDATE_FIELDS, Slot, SlotState, now, parse_options
from nbagent.supervisor.claims import bounds
from nbagent.supervisor.crash_points import Point, reach
from nbagent.supervisor.host_load import HostLoad
from nbagent.supervisor.records import Records
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.scope_limits import ScopeLimits
from nbagent.supervisor.sessions import Sessions


class Updates:
    """Changes slots."""

    def __init__(
        self, config: CurrentConfig, records: Records, limits: ScopeLimits, load: HostLoad, sessions: Sessions,
    ) -> None:
        self._config = config
        self._records = records
        self._limits = limits
        self._load = load
        self._sessions = sessions
        # Each update depends on the limits that the one before has left.
        self._lock = asyncio.Lock()

    async def update(self, live: RunningSlot, given: Mapping[str, object], client: str) -> None:
        """Changes the slot. Raises InvalidField, IllegalMove or RecordFailed."""
        async with self._lock:
            await self._update(live, given, client)

    async def _update(self, live: RunningSlot, given: Mapping[str, object], client: str) -> None:
        options = parse_options(given, UPDATE_FIELDS, bounds(self._config.value, self._load.cpus))
        if live.slot.state is not SlotState.CLAIMED or live.slot.claimed_s is None:
            raise IllegalMove(f"slot {live.slot.id} is {live.slot.state.value}; only a claimed slot can be changed")
        ttl_s = live.slot.ttl_s
        if options.ttl_s is not None:
            ttl_s = self._updated_ttl_s(live, live.slot.claimed_s, options.ttl_s)
        await self._change(live, dataclasses.replace(live.slot, limits=options.limits(live.slot.limits), ttl_s=ttl_s))
        text = ", ".join(f"{name}={value}" for name, value in given.items()) or "nothing"
        emit(Event.SLOT_UPDATED, slot=live.slot.id, client=client, text=text)

    async def _change(self, live: RunningSlot, slot: Slot) -> None:
        """Records a change before it is made, because adoption gives a scope the limits of its record.

        Raises RecordFailed or IllegalMove; the slot is as before then.
        """
        before = live.slot
        try:
            self._records.save(slot)
        except OSError as error:
            text = f"slot {slot.id} was not changed, because its record was not written: {error.strerror}"
            raise RecordFailed(text, errno=error.errno) from error
        reach(Point.UPDATE_RECORDED)
        try:
            if slot.limits != before.limits:
                await self._limits.set(live, slot.limits)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._records.save(before)
            raise IllegalMove(f"systemd did not change slot {slot.id}: {error}") from error
        # The slot can have been released meanwhile, so its state is kept.
        live.slot = dataclasses.replace(live.slot, ttl_s=slot.ttl_s)
        self._sessions.claimed(live.slot)

    def _updated_ttl_s(self, live: RunningSlot, claimed_s: float, from_now_s: float) -> float:
        ttl_s = now() - claimed_s + from_now_s
        longest_s = min(self._config.value.slots.ttl_max, live.slot.ends_s - claimed_s)
        if ttl_s > longest_s:
            expected = f"at most {max(0, int(longest_s - ttl_s + from_now_s))} seconds for this slot"
            raise InvalidField(field="ttl", value=from_now_s, expected=expected)
        return ttl_s
