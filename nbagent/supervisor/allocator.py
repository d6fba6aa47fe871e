# SPDX-License-Identifier: BSD-3-Clause
"""Warm slots for claims: out of the pool, or the next that becomes warm."""

from __future__ import annotations

from nbagent.config.host_config import CurrentConfig
from nbagent.core.errors import Full, NotReady, StartFailed
from nbagent.core.events import Event
from nbagent.core.model import SlotState, now
from nbagent.policy import admission
from nbagent.supervisor.health import Health
from nbagent.supervisor.host_load import HostLoad
from nbagent.supervisor.launcher import Launcher
from nbagent.supervisor.network import INTERNET
from nbagent.supervisor.pools import Pools
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.slot_stopper import SlotStopper
from nbagent.supervisor.slots import Slots

NO_INTERFACE = "it was started before a network was allowed and has no interface"


class Allocator:
    """Takes warm slots from the pools. A slot that it returns belongs to the caller, which claims or ends it."""

    def __init__(
        self, config: CurrentConfig, slots: Slots, pools: Pools, load: HostLoad, health: Health, launcher: Launcher,
        stopper: SlotStopper,
    ) -> None:
        self._config = config
        self._slots = slots
        self._pools = pools
        self._load = load
        self._health = health
        self._launcher = launcher
        self._stopper = stopper

    async def allocate(self, image: str, ttl_s: float, network: str) -> RunningSlot:
        """A warm slot that can live for `ttl_s` and can have the network.

        Raises Full, NotReady, StartFailed or RecordFailed.
        """
        # The claim of a slot that cannot be recorded or have its network would end this slot.
        self._health.check_records()
        if network == INTERNET:
            await self._health.check_network()
        while True:
            live = self._pools.take(image) or await self._wait(image)
            if live.slot.state is not SlotState.WARM:
                continue  # it ended after the pool gave it away
            if live.slot.ends_s < now() + ttl_s:
                # It was started while slots.ttl_max was shorter, and systemd does not change RuntimeMaxSec=.
                self._stopper.end(live, Event.SLOT_RETIRED, "its scope would end before its claim does")
            elif network == INTERNET and not live.slot.addresses:
                self._stopper.end(live, Event.SLOT_RETIRED, NO_INTERFACE)
            else:
                return live

    async def _wait(self, image: str) -> RunningSlot:
        self._launcher.prepare()
        self._check_queue_room(image)
        timeout_s = self._config.value.pool.claim_timeout
        try:
            return await self._pools.wait(image, timeout_s)
        except StartFailed as error:
            raise StartFailed(self._with_faults(str(error)), **error.details) from None
        except TimeoutError:
            launch, reason = self._load.launch(image)
            because = f" because {reason}" if reason else ""
            starting = self._slots.count(SlotState.STARTING, image)
            text = f"no slot became ready within {timeout_s:g} s; {starting} are being started, by {launch}{because}"
            raise NotReady(self._with_faults(text), retry_after_s=1) from None

    def _with_faults(self, text: str) -> str:
        """The reason of a refusal, which can be a consequence of a fault of the host that is not in it."""
        return "; ".join((text, *(f"{part}: {fault}" for part, fault in sorted(self._health.faults.items()))))

    def _check_queue_room(self, image: str) -> None:
        """Raises Full when all slots that can come are for claims that already wait."""
        host = self._load.host()
        short = {
            name: pool.count_waiting() - self._slots.count(SlotState.STARTING, name)
            for name, pool in self._pools.items()
        }
        ending = self._slots.count(SlotState.STOPPING) + self._slots.count(SlotState.FAILED)
        room = self._load.room(host, image)
        if not admission.may_wait(image, short, room, ending):
            obstacle = "the claim queue is full" if room else admission.obstacle(host)
            raise Full(f"no slot is free: {obstacle}", retry_after_s=self._load.retry_after_s())
