# SPDX-License-Identifier: BSD-3-Clause
"""The operations of the control API: one method each, with documents as results. Slots are listed without tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping

from nbagent.config.host_config import CurrentConfig
from nbagent.core.errors import SlotNotFound
from nbagent.core.events import Event, emit
from nbagent.core.model import SlotState, now
from nbagent.supervisor.claims import Claims
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.figures import Figures
from nbagent.supervisor.host_load import HostLoad
from nbagent.supervisor.lending import Lending
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.slot_stopper import SlotStopper
from nbagent.supervisor.slots import Slots
from nbagent.supervisor.tasks import Tasks
from nbagent.supervisor.trials import Trials
from nbagent.supervisor.updates import Updates

# For each slot of the host, as api.openapi documents it: a reading takes 50 us, so a thousand would delay claims.
READING_AGE_S = 0.03

Document = dict[str, object]


class Calls:
    """The operations."""

    def __init__(
        self, config: CurrentConfig, slots: Slots, load: HostLoad, claims: Claims, lending: Lending, updates: Updates,
        trials: Trials, figures: Figures, stopper: SlotStopper, counters: Counters, tasks: Tasks,
        changed: asyncio.Event,
    ) -> None:
        self._config = config
        self._slots = slots
        self._load = load
        self._claims = claims
        self._lending = lending
        self._updates = updates
        self._trials = trials
        self._figures = figures
        self._stopper = stopper
        self._counters = counters
        self._tasks = tasks
        self._changed = changed

    def spawn(self, work: Coroutine[object, object, None]) -> None:
        """Starts a task that serves a caller; the end of the supervisor cancels it."""
        self._tasks.spawn(work)

    async def claim(self, given: Mapping[str, object], key: str, client: str, trace: str = "") -> Document:
        """Claims a slot, as Claims.claim does; its document has the token."""
        return (await self._claims.claim(given, key, client, trace)).claim_document()

    async def lend(self, given: Mapping[str, object], key: str, client: str) -> Document:
        """Lends a slot, as Lending.lend does; its document has the token."""
        return (await self._lending.lend(given, key, client)).claim_document()

    def keep(self, slot_id: str, token: str, client: str) -> Document:
        """Makes a lent slot a claimed one. Raises SlotNotFound or RecordFailed."""
        return self._lending.keep(slot_id, token, client).claim_document()

    def give_back(self, slot_id: str, token: str, client: str) -> Document:
        """Ends a lent slot. Raises SlotNotFound."""
        return self._lending.give_back(slot_id, token, client).document(now())

    def abandon(self, slot_id: str) -> None:
        """Ends a claimed slot whose response did not reach the caller."""
        if live := self._slots.get(slot_id):
            self._stopper.end(live, Event.SLOT_RELEASED, client="the supervisor, because no client got it")

    def list_slots(self) -> list[Document]:
        """All slots. Usage is at most 30 ms old for each slot of the host, and at most cull.interval."""
        at_s = now()
        age_s = min(self._config.value.cull.interval, len(self._slots) * READING_AGE_S)
        return [live.document(at_s, at_s - age_s) for live in self._slots.values()]

    def slot(self, slot_id: str) -> Document:
        """One slot, with its usage now. Raises SlotNotFound."""
        return _document(self._find(slot_id))

    async def update(self, slot_id: str, given: Mapping[str, object], client: str) -> Document:
        """Changes the limits of a claimed slot, or its life counted from now.

        Raises SlotNotFound, InvalidField, IllegalMove or RecordFailed.
        """
        live = self._find(slot_id)
        await self._updates.update(live, given, client)
        return _document(live)

    def release(self, slot_id: str, client: str) -> Document:
        """Ends a slot for a client. Raises SlotNotFound."""
        live = self._find(slot_id)
        if live.slot.state is SlotState.CLAIMED:
            self._counters.add("released")
        self._stopper.end(live, Event.SLOT_RELEASED, client=client)
        return _document(live)

    @property
    def draining(self) -> bool:
        """Whether the host refuses claims."""
        return self._load.draining

    def set_draining(self, draining: bool) -> Document:
        """Starts or ends draining: the host refuses claims, and claimed slots go on."""
        if draining != self._load.draining:
            self._load.set_draining(draining)
            emit(Event.DRAIN_STARTED if draining else Event.DRAIN_ENDED)
        self._changed.set()
        return {
            "draining": draining,
            "claimed": self._slots.count(SlotState.CLAIMED),
            "warm": self._slots.count(SlotState.WARM),
        }

    def recycle_pool(self) -> Document:
        """Ends every warm slot, and the pools start others. tmpnb calls it draining the pool."""
        count = self._stopper.retire_warm("the pool was recycled")
        self._changed.set()
        return {"drained": count}

    async def try_start(self) -> Document:
        """Starts a slot of the default image, requests it through the router, and ends it.

        Raises StartFailed, ImageNotFound, or Full when there is no room for it.
        """
        return await self._trials.run()

    def images(self) -> list[Document]:
        """The images of this host."""
        return self._figures.images()

    def stats(self) -> Document:
        """The figures of the host."""
        return self._figures.stats()

    def free_percent(self) -> int:
        """The part of the capacity that claims can get, in percent; 0 only when a claim would be refused."""
        return self._figures.free_percent()

    def _find(self, slot_id: str) -> RunningSlot:
        live = self._slots.get(slot_id)
        if live is None:
            raise SlotNotFound(f"no slot {slot_id} lives on this host", slot=slot_id)
        return live


def _document(live: RunningSlot) -> Document:
    at_s = now()
    return live.document(at_s, at_s)
