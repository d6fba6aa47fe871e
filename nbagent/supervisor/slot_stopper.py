# SPDX-License-Identifier: BSD-3-Clause
"""The end of a slot: its route at once, then its processes, its interface and its place among the slots."""

from __future__ import annotations

import asyncio
import contextlib

from nbagent.config.host_config import CurrentConfig
from nbagent.core.events import Event, emit
from nbagent.core.model import Slot, SlotState, now
from nbagent.supervisor.crash_points import Point, reach
from nbagent.supervisor.images import Images
from nbagent.supervisor.interfaces import Interfaces
from nbagent.supervisor.pools import Pools
from nbagent.supervisor.records import Records
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.sessions import Sessions
from nbagent.supervisor.slots import Slots
from nbagent.supervisor.systemd import Systemd
from nbagent.supervisor.tasks import Tasks
from nbagent.wire.aio import readable

# From the SIGKILL of a slot's processes to the end of the last.
END_MAX_S = 60.0
# Between two attempts to stop a scope, when systemd is not reachable or refuses.
STOP_PAUSE_S, STOP_PAUSE_MAX_S = 0.5, 30.0

# For the page of a user, who must not learn the address of the caller.
REASONS = {Event.SLOT_RELEASED: "released by the service that started it"}


class SlotStopper:
    """Ends slots. `finish` waits for the ends that are under way."""

    def __init__(
        self, config: CurrentConfig, slots: Slots, pools: Pools, records: Records, systemd: Systemd,
        interfaces: Interfaces, images: Images, sessions: Sessions, changed: asyncio.Event,
    ) -> None:
        self._config = config
        self._slots = slots
        self._pools = pools
        self._records = records
        self._systemd = systemd
        self._interfaces = interfaces
        self._images = images
        self._sessions = sessions
        self._changed = changed
        self._cleanups = Tasks()
        self._finishing = False

    def end(
        self, live: RunningSlot, event: Event, text: str | None = None, state: SlotState = SlotState.STOPPING,
        at_once: bool = False, **facts: object,
    ) -> None:
        """Ends a slot; a second call does nothing. The router stops serving it at once, its processes end later.

        `at_once`: its processes get no time to save anything. `facts` are further fields of the event.
        """
        if live.slot.state in (SlotState.STOPPING, SlotState.FAILED, SlotState.GONE):
            return
        self._slots.move(live, state, reason=event.name.lower())
        self._pools.remove(live)
        # If the supervisor ends before the scope does, the next supervisor stops the scope because it has no file.
        with contextlib.suppress(OSError):  # _clean tries again
            self._records.remove(live.slot.id)
        self._sessions.ended(live.slot, REASONS.get(event) or text or event.name.lower())
        reach(Point.ROUTE_REMOVED)
        emit(event, slot=live.slot.id, **({} if text is None else {"text": text}), **facts)
        self._cleanups.spawn(self._clean(live, at_once or live.slot.claimed_s is None))

    def retire_warm(self, text: str) -> int:
        """Ends every warm slot; returns their number."""
        warm = self._pools.warm_slots()
        for live in warm:
            self.end(live, Event.SLOT_RETIRED, text)
        return len(warm)

    async def finish(self) -> None:
        """Waits until every slot that is ending has ended, or systemd has refused once more to stop it."""
        self._finishing = True
        await self._cleanups.finish()

    async def _stop(self, slot: Slot, at_once: bool) -> bool:
        """Stops the slot's scope and removes its record, and tries again until both are done; False when the supervisor
        ends before.

        The next supervisor does it then, because the slot has no record, or no scope.
        """
        pause_s = STOP_PAUSE_S
        while not self._finishing:
            try:
                await self._systemd.stop(slot.scope, at_once=at_once)
                self._records.remove(slot.id)
                return True
            except OSError as error:
                emit(Event.SLOT_STOP_FAILED, slot=slot.id, wait_s=f"{pause_s:g}", text=str(error))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, STOP_PAUSE_MAX_S)
        return False

    async def _clean(self, live: RunningSlot, at_once: bool) -> None:
        # Before the stop, because the cgroup is removed with its last process.
        slot, used, began_s = live.slot, live.final(), now()
        if not await self._stop(slot, at_once):
            return
        reach(Point.STOPPED)
        timeout_s = self._config.value.slots.stop_timeout
        if not at_once and now() - began_s >= timeout_s:
            emit(Event.SLOT_KILLED, slot=slot.id, wait_s=f"{timeout_s:g}")
        if live.task is not None:
            live.task.cancel()
            await asyncio.gather(live.task, return_exceptions=True)
        if live.pidfd >= 0:
            # systemd does not wait for the end of a killed process, and the kernel takes seconds to free memory and
            # hundreds of thousands of files. The init of a pid namespace ends after all other processes in it.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_MAX_S):
                    await readable(live.pidfd)
        await live.release_storage()
        live.close()
        await self._interfaces.remove(slot)
        self._slots.move(live, SlotState.GONE)
        self._slots.remove(live)
        emit(
            Event.SLOT_GONE, slot=slot.id, age_s=round(now() - slot.created_s), cpu_s=round(used.cpu_s),
            peak_bytes=used.peak_bytes, oom_kills=used.oom_kills,
        )
        self._images.slot_removed(slot.digest)
        self._changed.set()
