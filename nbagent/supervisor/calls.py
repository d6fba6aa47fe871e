# SPDX-License-Identifier: BSD-3-Clause
"""The operations of the control API: one method each, with documents as results. Slots are listed without tokens."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import Coroutine, Mapping

import nbagent
from nbagent.config.host_config import CurrentConfig
from nbagent.core.errors import IllegalMove, InvalidField, RecordFailed, SlotNotFound
from nbagent.core.events import Event, emit
from nbagent.core.model import UPDATE_FIELDS, Slot, SlotState, now, parse_options
from nbagent.policy import admission
from nbagent.supervisor.claims import Claims, bounds
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.host_load import HostLoad
from nbagent.supervisor.pools import Pools
from nbagent.supervisor.records import Records
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.slot_stopper import SlotStopper
from nbagent.supervisor.slots import Slots
from nbagent.supervisor.systemd import Systemd
from nbagent.supervisor.tasks import Tasks

# For each slot of the host, as api.openapi documents it: a reading takes 50 us, so a thousand would delay claims.
READING_AGE_S = 0.03

Document = dict[str, object]


class Calls:
    """The operations."""

    def __init__(
        self, config: CurrentConfig, slots: Slots, pools: Pools, records: Records, systemd: Systemd, load: HostLoad,
        claims: Claims, stopper: SlotStopper, counters: Counters, tasks: Tasks, changed: asyncio.Event,
    ) -> None:
        self._config = config
        self._slots = slots
        self._pools = pools
        self._records = records
        self._systemd = systemd
        self._load = load
        self._claims = claims
        self._stopper = stopper
        self._counters = counters
        self._tasks = tasks
        self._changed = changed

    def spawn(self, work: Coroutine[object, object, None]) -> None:
        """Starts a task that serves a caller; the end of the supervisor cancels it."""
        self._tasks.spawn(work)

    async def claim(self, given: Mapping[str, object], key: str, client: str) -> Document:
        """Claims a slot, as Claims.claim does; its document has the token."""
        return (await self._claims.claim(given, key, client)).claim_document()

    def abandon(self, slot_id: str) -> None:
        """Ends a claimed slot whose response did not reach the caller."""
        if live := self._slots.get(slot_id):
            self._stopper.end(live, Event.SLOT_RELEASED)

    def list_slots(self) -> list[Document]:
        """All slots. Usage is at most 30 ms old for each slot of the host, and at most cull.interval."""
        at_s = now()
        age_s = min(self._config.value.cull.interval, len(self._slots) * READING_AGE_S)
        return [live.document(at_s, at_s - age_s) for live in self._slots.values()]

    def slot(self, slot_id: str) -> Document:
        """One slot, with its usage now. Raises SlotNotFound."""
        return _document(self._find(slot_id))

    def update(self, slot_id: str, given: Mapping[str, object]) -> Document:
        """Changes the limits of a claimed slot, or its life counted from now.

        Raises SlotNotFound, InvalidField, IllegalMove or RecordFailed.
        """
        live = self._find(slot_id)
        options = parse_options(given, UPDATE_FIELDS, bounds(self._config.value, self._load.cpus))
        if live.slot.state is not SlotState.CLAIMED or live.slot.claimed_s is None:
            raise IllegalMove(f"slot {slot_id} is {live.slot.state.value}; only a claimed slot can be changed")
        ttl_s = live.slot.ttl_s
        if options.ttl_s is not None:
            ttl_s = self._updated_ttl_s(live, live.slot.claimed_s, options.ttl_s)
        self._change(live, dataclasses.replace(live.slot, limits=options.limits(live.slot.limits), ttl_s=ttl_s))
        emit(Event.SLOT_UPDATED, slot=slot_id, text=", ".join(f"{k}={v}" for k, v in given.items()) or "nothing")
        return _document(live)

    def _change(self, live: RunningSlot, slot: Slot) -> None:
        """Records a change before it is made, because adoption gives a scope the limits of its record.

        Raises RecordFailed or IllegalMove; the slot is as before then.
        """
        before = live.slot
        try:
            self._records.save(slot)
        except OSError as error:
            text = f"slot {slot.id} was not changed, because its record was not written: {error.strerror}"
            raise RecordFailed(text, errno=error.errno) from error
        try:
            if slot.limits != before.limits:
                self._systemd.set_limits(slot.scope, slot.limits)
                live.publish(slot.limits)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._records.save(before)
            raise IllegalMove(f"systemd did not change slot {slot.id}: {error}") from error
        live.slot = slot

    def _updated_ttl_s(self, live: RunningSlot, claimed_s: float, from_now_s: float) -> float:
        ttl_s = now() - claimed_s + from_now_s
        longest_s = min(self._config.value.slots.ttl_max, live.slot.ends_s - claimed_s)
        if ttl_s > longest_s:
            expected = f"at most {max(0, int(longest_s - ttl_s + from_now_s))} seconds for this slot"
            raise InvalidField(field="ttl", value=from_now_s, expected=expected)
        return ttl_s

    def release(self, slot_id: str) -> Document:
        """Ends a slot. Raises SlotNotFound."""
        live = self._find(slot_id)
        if live.slot.state is SlotState.CLAIMED:
            self._counters.add("released")
        self._stopper.end(live, Event.SLOT_RELEASED)
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
        warm = self._pools.warm_slots()
        for live in warm:
            self._stopper.end(live, Event.SLOT_RETIRED, "the pool was recycled")
        self._changed.set()
        return {"drained": len(warm)}

    def images(self) -> list[Document]:
        """The images of this host."""
        config = self._config.value
        return [
            {
                "name": name, "digest": pool.image.digest, "launch": pool.image.launch,
                "warm": len(pool.warm), "wanted": config.warm(name),
                "default": name == config.pool.image,
            }
            for name, pool in sorted(self._pools.items()) if pool.image is not None
        ]

    def stats(self) -> Document:
        """The figures of the host."""
        config, host = self._config.value, self._load.host()
        states = {state.value: self._slots.count(state) for state in SlotState}
        default = self._pools.get(config.pool.image)
        return {
            "version": nbagent.__version__,
            "label": config.label,
            "available": self._available(host),
            "capacity": host.capacity,
            **{state: states[state] for state in ("warm", "starting", "claimed", "stopping")},
            "draining": host.draining,
            "ready": default is not None and default.image is not None and not default.failures,
            "container_image": config.pool.image,
            "memory_available_bytes": host.memory_available_bytes,
            "free_percent": self._free_percent(host),
            "next_end_s": self._load.next_end_s(),
            "pools": {
                name: {
                    "wanted": config.warm(name), "warm": len(pool.warm),
                    "starting": self._slots.count(SlotState.STARTING, name), "failures": pool.failures,
                }
                for name, pool in sorted(self._pools.items())
            },
            **self._counters.document(),
            "uptime_s": round(now() - self._counters.started_s),
        }

    def free_percent(self) -> int:
        """The part of the capacity that claims can get, in percent; 0 only when a claim would be refused."""
        return self._free_percent(self._load.host())

    def _free_percent(self, host: admission.Host) -> int:
        available = self._available(host)
        return min(100, math.ceil(100 * available / host.capacity)) if available else 0

    def _available(self, host: admission.Host) -> int:
        """The claims that can get a slot: of those that are ready or start, and of the default image.

        While starts of the default image fail, only warm slots count, because other claims would wait until they fail.
        """
        if host.draining:
            return 0
        default = self._pools.get(self._config.value.pool.image)
        warm = self._slots.count(SlotState.WARM)
        if default is None or default.image is None or default.failures:
            return warm
        return warm + self._slots.count(SlotState.STARTING) + self._load.room(host, default.image.name)

    def _find(self, slot_id: str) -> RunningSlot:
        live = self._slots.get(slot_id)
        if live is None:
            raise SlotNotFound(f"no slot {slot_id} lives on this host", slot=slot_id)
        return live


def _document(live: RunningSlot) -> Document:
    at_s = now()
    return live.document(at_s, at_s)
