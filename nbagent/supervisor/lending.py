# SPDX-License-Identifier: BSD-3-Clause
"""Lent slots: a visitor's browser loads the notebook before the click, in a slot that becomes a claim with the click.

A lent slot is a claimed one with a short life and the address of its client. The landing page keeps it, and
its life then begins anew; or gives it back; or the slot ends by itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
from collections.abc import Mapping

from nbagent.config.host_config import CurrentConfig
from nbagent.core.errors import Full, RecordFailed, SlotNotFound
from nbagent.core.events import Event, emit
from nbagent.core.model import Slot, SlotState, now
from nbagent.policy import lending
from nbagent.supervisor.claims import Claims
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.host_load import RETRY_MAX_S, HostLoad
from nbagent.supervisor.pools import Pools
from nbagent.supervisor.records import Records
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.sessions import Sessions
from nbagent.supervisor.slot_stopper import SlotStopper
from nbagent.supervisor.slots import Slots


class Lending:
    """Lends slots of the default image."""

    def __init__(
        self, config: CurrentConfig, slots: Slots, pools: Pools, records: Records, load: HostLoad, claims: Claims,
        stopper: SlotStopper, counters: Counters, sessions: Sessions,
    ) -> None:
        self._config = config
        self._slots = slots
        self._pools = pools
        self._records = records
        self._load = load
        self._claims = claims
        self._stopper = stopper
        self._counters = counters
        self._sessions = sessions

    async def lend(self, given: Mapping[str, object], key: str, client: str) -> Slot:
        """Lends a slot with the options of a claim. Raises Full, and what a claim raises."""
        obstacle = lending.obstacle(self._load.host(), self._stock(client))
        if obstacle is not None:
            raise Full(f"no slot is lent: {obstacle}", retry_after_s=RETRY_MAX_S)
        slot = await self._claims.lend(given, key, client)
        self._end_in_time(slot.id)
        return slot

    def adopt(self) -> None:
        """Ends the slots that a former supervisor has lent at the times that are in their records."""
        for live in list(self._slots.values()):
            self._end_in_time(live.slot.id)

    def _stock(self, client: str) -> lending.Stock:
        image = self._config.value.pool.image
        network = lending.client_network(client)
        lent = [live.slot.lent_to for live in self._slots.values() if live.slot.lent_to is not None]
        of_client = sum(lending.client_network(address) == network for address in lent)
        warm = self._slots.count(SlotState.WARM, image)
        return lending.Stock(warm, self._pools.wanted(image), len(lent), of_client)

    def _end_in_time(self, slot_id: str) -> None:
        """Ends a slot that is still lent when its life is over: now, or by a timer."""
        live = self._slots.get(slot_id)
        if live is None or live.slot.lent_to is None or live.slot.expires_s is None:
            return
        left_s = live.slot.expires_s - now()
        if left_s > 0:
            asyncio.get_running_loop().call_later(left_s, self._end_in_time, slot_id)
        else:
            self._stopper.end(live, Event.SLOT_RETURNED, f"not claimed within {live.slot.ttl_s:g} s")

    def keep(self, slot_id: str, token: str, client: str) -> Slot:
        """Makes a lent slot a claimed one, whose life begins now; a repetition changes nothing.

        Raises SlotNotFound without a slot that has this token, or RecordFailed.
        """
        live = self._find(slot_id, token)
        if live.slot.lent_to is None:
            return live.slot
        at_s = now()
        ttl_s = min(self._config.value.slots.ttl, live.slot.ends_s - at_s)
        slot = dataclasses.replace(live.slot, lent_to=None, claimed_s=at_s, ttl_s=ttl_s)
        try:
            self._records.save(slot)
        except OSError as error:
            raise RecordFailed(f"the record of slot {slot.id} was not written: {error.strerror}",
                               errno=error.errno) from error
        live.slot = slot
        self._counters.add("claims")
        self._counters.add("lent_kept")
        emit(Event.SLOT_CLAIMED, slot=slot.id, client=client, ttl_s=f"{ttl_s:g}", image=slot.image,
             network=slot.network, **slot.limits.document())
        self._sessions.claimed(slot)
        return slot

    def give_back(self, slot_id: str, token: str, client: str) -> Slot:
        """Ends a lent slot; a claimed one goes on. Raises SlotNotFound without a slot that has this token."""
        live = self._find(slot_id, token)
        if live.slot.lent_to is not None:
            self._stopper.end(live, Event.SLOT_RETURNED, f"given back by {client}")
        return live.slot

    def _find(self, slot_id: str, token: str) -> RunningSlot:
        live = self._slots.get(slot_id)
        if (
            live is None or live.slot.state is not SlotState.CLAIMED
            or not hmac.compare_digest(live.slot.token.encode(), token.encode())
        ):
            raise SlotNotFound("no slot of this id and token runs here", slot=slot_id)
        return live
