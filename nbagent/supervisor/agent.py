# SPDX-License-Identifier: BSD-3-Clause
"""The loop of the supervisor: what the policy decides is done, whenever something has changed.

Events (a claim, the end of a process, a failed start, a signal) change the state and set `changed`. Slow work is in
tasks: one for the start of a slot, one for its end. No slot is polled.
"""

from __future__ import annotations

import asyncio
import contextlib

from nbagent.config.host_config import CurrentConfig, HostConfig
from nbagent.core.events import Event
from nbagent.core.model import now
from nbagent.policy import pool as policy
from nbagent.supervisor.allocator import NO_INTERFACE
from nbagent.supervisor.host_load import HostLoad
from nbagent.supervisor.images import Images
from nbagent.supervisor.interfaces import Interfaces
from nbagent.supervisor.monitor import Monitor
from nbagent.supervisor.pools import Pools
from nbagent.supervisor.slot_starter import SlotStarter
from nbagent.supervisor.slot_stopper import SlotStopper
from nbagent.supervisor.tasks import Tasks
from nbagent.supervisor.zygotes import Zygotes

# Between two rounds of the loop without an event.
PAUSE_MIN_S = 0.05


class Agent:
    """The loop. `reload` and `stop` are for the signals of the service."""

    def __init__(
        self, config: CurrentConfig, pools: Pools, load: HostLoad, zygotes: Zygotes, images: Images, monitor: Monitor,
        starter: SlotStarter, stopper: SlotStopper, interfaces: Interfaces, tasks: Tasks, changed: asyncio.Event,
    ) -> None:
        self._config = config
        self._pools = pools
        self._load = load
        self._zygotes = zygotes
        self._images = images
        self._monitor = monitor
        self._starter = starter
        self._stopper = stopper
        self._interfaces = interfaces
        self._tasks = tasks
        self._changed = changed
        self._stopping = False

    async def run(self) -> None:
        """Applies the policy until `stop`: at each change, and when slots are due for a sample."""
        while not self._stopping:
            self._changed.clear()
            # Before the policy, so that a pause that ends while it is applied is not missed.
            began_s = now()
            self._apply_policy()
            self._zygotes.review()
            cull = self._config.value.cull
            if now() >= self._monitor.next_s(cull.interval):
                self._monitor.sample(cull, now())
            if now() >= self._interfaces.next_s:
                self._tasks.spawn(self._interfaces.review(now()))
            next_s = min(
                self._pools.next_start_s(began_s, now() + cull.interval), self._monitor.next_s(cull.interval),
                max(self._interfaces.next_s, now() + PAUSE_MIN_S),
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(PAUSE_MIN_S, next_s - now()))

    async def stop(self) -> None:
        """Ends slots that are starting, and leaves warm and claimed ones running for the next supervisor."""
        self._stopping = True
        self._changed.set()
        await self._tasks.cancel()
        await self._stopper.finish()
        await self._zygotes.close()

    def reload(self, config: HostConfig) -> None:
        """Puts a configuration into force. Claimed slots are not touched."""
        self._config.value = config
        self._tasks.spawn(self._interfaces.set_up())
        if self._interfaces.allowed:
            for live in self._pools.warm_slots():
                if not live.slot.addresses:
                    self._stopper.end(live, Event.SLOT_RETIRED, NO_INTERFACE)
        self._images.refresh()

    def _apply_policy(self) -> None:
        config = self._config.value
        decision = policy.decide(
            self._pools.snapshot(self._zygotes), self._load.host(), now(), config.pool.max_age, config.slots.ttl_max
        )
        if decision.retire:
            reasons = {move.id: move.reason for move in decision.retire}
            for live in self._pools.warm_slots():
                if live.slot.id in reasons:
                    self._stopper.end(live, Event.SLOT_RETIRED, reasons[live.slot.id])
        for name in decision.start:
            # The policy starts only slots of pools that have an image.
            image = self._pools[name].image
            assert image is not None
            self._starter.start(image)
