"""What callers ask of the supervisor: claims, and everything else the API offers, one method a call.

A claim is made once for its key: whoever asks again with the same key gets the same slot, over a
restart of the supervisor too, as the key is in the slot's file.

Checks what comes in, changes the agent's slots, answers with documents. Not for the lives of slots;
those are the agent's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import nbagent
from nbagent.core import urls
from nbagent.core.claim_content import Content
from nbagent.core.errors import (
    ContentFailed,
    Draining,
    Full,
    IdempotencyMismatch,
    IllegalMove,
    ImageNotFound,
    InvalidField,
    NbagentError,
    SlotNotFound,
    StartFailed,
)
from nbagent.core.events import Event, emit
from nbagent.core.model import CLAIM_FIELDS, UPDATE_FIELDS, Bounds, Options, Slot, SlotState, now, parse_options
from nbagent.policy import admission
from nbagent.supervisor import content_injector
from nbagent.supervisor.agent import NO_INTERFACE, Agent
from nbagent.supervisor.network import INTERNET
from nbagent.supervisor.running_slot import RunningSlot

RETRY_MAX_S = 60
# For each slot of the host, as api.openapi tells callers: reading what one uses takes 50 us, a thousand hold up claims.
READING_AGE_S = 0.03


class Calls:
    """The calls of one agent; made after it has adopted what it found."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.keys: dict[str, tuple[str, asyncio.Future[Slot]]] = {}
        for live in agent.slots.values():
            if live.slot.state is SlotState.CLAIMED and live.slot.key is not None:
                claim: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
                claim.set_result(live.slot)
                self.keys[live.slot.key] = (live.slot.fingerprint or "", claim)
        agent.gone = self._slot_gone
        self._first_end_s: float | None = None
        self._looked_s = -math.inf

    async def claim(self, given: Mapping[str, Any], key: str, client: str) -> dict[str, Any]:
        """Hands out a slot; the same one for the same key, as long as it lives.

        Raises InvalidField, Draining, Full, StartFailed, ContentFailed, IdempotencyMismatch.
        """
        began_s = now()
        try:
            options = parse_options(given, CLAIM_FIELDS, self._bounds())
            image = self._claimed_image(options)
            config = self.agent.config
            _check_network(options, options.network or config.network_mode(image), config.network.allow)
            slot = await self._claim_once(image, options, key, _fingerprint(given), client)
        except NbagentError as error:
            self.agent.counters.add("claims_refused")
            if isinstance(error, Full):
                emit(Event.HOST_FULL, text=str(error))
            raise
        self.agent.counters.claim_seconds.observe(now() - began_s)
        return slot.claim_document()

    async def _claim_once(self, image: str, options: Options, key: str, fingerprint: str, client: str) -> Slot:
        known = self.keys.get(key)
        if known is not None and not self._is_spent(known[1]):
            if known[0] != fingerprint:
                raise IdempotencyMismatch("this Idempotency-Key was used with other options", field="Idempotency-Key")
            # One caller that goes away does not take the slot from the next that asks.
            slot = await asyncio.shield(known[1])
            # It may have other limits or more time by now.
            return self.agent.slots[slot.id].slot if slot.id in self.agent.slots else slot
        claim: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self.keys[key] = (fingerprint, claim)
        try:
            slot = await self._claim(image, options, key, fingerprint, client)
        except BaseException as error:
            del self.keys[key]
            if isinstance(error, asyncio.CancelledError):
                claim.cancel()
            else:
                claim.set_exception(error)
                # Looked at, as asyncio has it: perhaps nobody else asks with this key.
                claim.exception()
            raise
        claim.set_result(slot)
        return slot

    def _is_spent(self, claim: asyncio.Future[Slot]) -> bool:
        """Whether the slot of a key's claim has ended: then the key may claim anew."""
        if not claim.done():
            return False
        live = self.agent.slots.get(claim.result().id)
        return live is None or live.slot.state is not SlotState.CLAIMED

    async def _claim(self, image: str, options: Options, key: str, fingerprint: str, client: str) -> Slot:
        if self.agent.draining:
            raise Draining("the host is draining and hands out no slots", retry_after_s=RETRY_MAX_S)
        ttl_s = options.ttl_s or self.agent.config.slots.ttl
        network = options.network or self.agent.config.network_mode(image)
        live = await self._take_for(image, ttl_s, network)
        limits = options.limits(live.slot.limits)
        if limits != live.slot.limits:
            try:
                self.agent.systemd.set_limits(live.slot.scope, limits)
            except OSError as error:
                self.agent.end(live, Event.SLOT_DIED, text=f"limits not set: {error}")
                raise StartFailed(f"limits not set: {error}", step="limits") from error
        claimed_s = now()
        if options.content or network == INTERNET:
            await self._prepare(live, network, options.content)
        self.agent.slots.move(
            live, SlotState.CLAIMED,
            limits=limits, claimed_s=claimed_s, ttl_s=ttl_s,
            path=options.path or live.slot.path, key=key, fingerprint=fingerprint, network=network,
        )
        self.agent.records.save(live.slot)
        if live.slot.addresses and network != INTERNET:
            # Closed its interface is already; this takes it out of sight.
            self.agent.spawn(self.agent.disconnect(live.slot))
        self.agent.counters.add("claims")
        # In the loop's next turn, as is the start of a slot in its place: the answer goes first.
        asyncio.get_running_loop().call_soon(
            partial(emit, Event.SLOT_CLAIMED, slot=live.slot.id, client=client, ttl_s=f"{ttl_s:g}")
        )
        self.agent.wake()
        return live.slot

    async def _prepare(self, live: RunningSlot, network: str, content: Content) -> None:
        """Gives a slot that is nobody's yet its network and its content; one that does not get both is ended."""
        agent = self.agent
        agent.slots.move(live, SlotState.PREPARING, network=network)
        # From here on a supervisor that finds this slot ends it, as it does with one that is half started.
        agent.records.save(live.slot)
        try:
            if network == INTERNET:
                await agent.network.open(live.slot)
            if content:
                await self._fill(live, content)
            if live.slot.state is not SlotState.PREPARING:
                raise ContentFailed("the slot ended")
        except BaseException as error:
            text = "the claim was given up" if isinstance(error, asyncio.CancelledError) else str(error) or repr(error)
            agent.end(live, Event.SLOT_NOT_PREPARED, text=text)
            raise

    async def _fill(self, live: RunningSlot, content: Content) -> None:
        """Brings content into a slot."""
        agent, began_s = self.agent, now()
        filled = await content_injector.inject(
            live.slot, live.pidfd, content, agent.config.claims,
            lambda pid: agent.systemd.attach(live.slot.scope, [pid]),
        )
        text = f"{filled.files} files" if content.archive is None else (
            f"{filled.files} files, {filled.entries} entries of {content.archive}"
        )
        emit(Event.CONTENT_DELIVERED, slot=live.slot.id, took_ms=round((now() - began_s) * 1000), text=text)

    async def _take_for(self, image: str, ttl_s: float, network: str) -> RunningSlot:
        """A warm slot that will live for as long as it is claimed for, and can have its network."""
        while True:
            live = await self._take(image)
            if live.slot.state is not SlotState.WARM:
                continue  # it ended on the way from the pool to here
            if live.slot.ends_s < now() + ttl_s:
                # Made when the settings allowed shorter lives, and PID 1 keeps to that.
                self.agent.end(live, Event.SLOT_RETIRED, text="it would end before its claim does")
            elif network == INTERNET and not live.slot.addresses:
                self.agent.end(live, Event.SLOT_RETIRED, text=NO_INTERFACE)
            else:
                return live

    async def _take(self, image: str) -> RunningSlot:
        """A warm slot out of the pool, or the next one to become warm."""
        state = self.agent.pools[image]
        if state.warm:
            return state.warm.popleft()
        self.agent.launcher.prepare()
        self._check_queue_room(image)
        waiter: asyncio.Future[RunningSlot] = asyncio.get_running_loop().create_future()
        state.waiting.append(waiter)
        self.agent.wake()
        try:
            async with asyncio.timeout(self.agent.config.pool.claim_timeout):
                return await waiter
        except TimeoutError:
            if state.failures and state.last_failure is not None:
                raise StartFailed(str(state.last_failure), **state.last_failure.details) from None
            raise Full("no slot became ready in time", retry_after_s=self._retry_after_s()) from None
        finally:
            # A waiter that got its slot but cannot take it any more gives it to the next.
            if waiter.done() and not waiter.cancelled() and (task := asyncio.current_task()) and task.cancelling():
                self.agent.offer(waiter.result())
            waiter.cancel()

    def _check_queue_room(self, image: str) -> None:
        """Raises Full when the slots that can come are all for claims that wait already."""
        slots, host = self.agent.slots, self.agent.host()
        short = {
            name: state.count_waiting() - slots.count(SlotState.STARTING, name)
            for name, state in self.agent.pools.items()
        }
        ending = slots.count(SlotState.STOPPING) + slots.count(SlotState.FAILED)
        room = admission.room(host, self.agent.zygotes.launch(image))
        if not admission.may_wait(image, short, room, ending):
            obstacle = "as many claims wait as there is room for" if room else admission.obstacle(host)
            raise Full(f"no slot is free: {obstacle}", retry_after_s=self._retry_after_s())

    def abandon(self, slot_id: str) -> None:
        """Ends a slot whose claim nobody received."""
        if live := self.agent.slots.get(slot_id):
            self.agent.end(live, Event.SLOT_RELEASED)

    def list_slots(self) -> list[dict[str, Any]]:
        """All slots. What they use may be old by 30 ms for each slot of the host, and by a look's interval at most."""
        slots, at_s = self.agent.slots, now()
        age_s = min(self.agent.config.cull.interval, len(slots) * READING_AGE_S)
        return [live.document(at_s, at_s - age_s) for live in slots.values()]

    def slot(self, slot_id: str) -> dict[str, Any]:
        """One slot. Raises SlotNotFound."""
        return _fresh(self._live(slot_id))

    def update(self, slot_id: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Changes a claimed slot's limits, or its life counted from now.

        Raises SlotNotFound, InvalidField, IllegalMove.
        """
        live = self._live(slot_id)
        options = parse_options(given, UPDATE_FIELDS, self._bounds())
        if live.slot.state is not SlotState.CLAIMED or live.slot.claimed_s is None:
            raise IllegalMove(f"slot {slot_id} is {live.slot.state.value}; only a claimed slot can be changed")
        limits = options.limits(live.slot.limits)
        if limits != live.slot.limits:
            try:
                self.agent.systemd.set_limits(live.slot.scope, limits)
            except OSError as error:
                raise IllegalMove(f"systemd did not change slot {slot_id}: {error}") from error
        ttl_s = live.slot.ttl_s
        if options.ttl_s is not None:
            ttl_s = now() - live.slot.claimed_s + options.ttl_s
            longest_s = min(self.agent.config.slots.ttl_max, live.slot.ends_s - live.slot.claimed_s)
            if ttl_s > longest_s:
                expected = f"at most {max(0, int(longest_s - ttl_s + options.ttl_s))} seconds for this slot"
                raise InvalidField(field="ttl", value=options.ttl_s, expected=expected)
        live.slot = dataclasses.replace(live.slot, limits=limits, ttl_s=ttl_s)
        self.agent.records.save(live.slot)
        emit(Event.SLOT_UPDATED, slot=slot_id, text=", ".join(f"{k}={v}" for k, v in given.items()) or "nothing")
        return _fresh(live)

    def release(self, slot_id: str) -> dict[str, Any]:
        """Ends a slot. Raises SlotNotFound."""
        live = self._live(slot_id)
        if live.slot.state is SlotState.CLAIMED:
            self.agent.counters.add("released")
        self.agent.end(live, Event.SLOT_RELEASED)
        return _fresh(live)

    def set_draining(self, draining: bool) -> dict[str, Any]:
        """Stops or resumes handing out. It survives a restart of the agent, not a reboot."""
        if draining != self.agent.draining:
            if draining:
                self.agent.drain_file.touch()
            else:
                self.agent.drain_file.unlink(missing_ok=True)
            emit(Event.DRAIN_STARTED if draining else Event.DRAIN_ENDED)
        self.agent.wake()
        return {
            "draining": draining,
            "claimed": self.agent.slots.count(SlotState.CLAIMED),
            "warm": self.agent.slots.count(SlotState.WARM),
        }

    def recycle_pool(self) -> dict[str, Any]:
        """Ends every warm slot; new ones take their places. tmpnb calls it draining the pool."""
        warm = [live for state in self.agent.pools.values() for live in state.warm]
        for live in warm:
            self.agent.end(live, Event.SLOT_RETIRED, text="the pool is renewed")
        self.agent.wake()
        return {"drained": len(warm)}

    def images(self) -> list[dict[str, Any]]:
        """The images of this host."""
        return [
            {
                "name": name, "digest": state.image.digest, "launch": state.image.launch,
                "warm": len(state.warm), "wanted": self.agent.config.warm(name),
                "default": name == self.agent.config.pool.image,
            }
            for name, state in sorted(self.agent.pools.items()) if state.image is not None
        ]

    def stats(self) -> dict[str, Any]:
        """The host at a glance."""
        host = self.agent.host()
        states = {state.value: self.agent.slots.count(state) for state in SlotState}
        default = self.agent.pools.get(self.agent.config.pool.image)
        available = 0 if host.draining else states["warm"] + states["starting"] + self._room(host)
        return {
            "version": nbagent.__version__,
            "label": self.agent.label,
            "available": available,
            "capacity": host.capacity,
            **{state: states[state] for state in ("warm", "starting", "claimed", "stopping")},
            "draining": host.draining,
            "ready": default is not None and default.image is not None and not default.failures,
            "container_image": self.agent.config.pool.image,
            "memory_available_bytes": host.memory_available_bytes,
            "free_percent": self.free_percent(),
            "next_end_s": self._next_end_s(),
            "pools": {
                name: {
                    "wanted": self.agent.config.warm(name), "warm": len(state.warm),
                    "starting": self.agent.slots.count(SlotState.STARTING, name), "failures": state.failures,
                }
                for name, state in sorted(self.agent.pools.items())
            },
            **self.agent.counters.document(),
            "uptime_s": round(now() - self.agent.started_s),
        }

    def free_percent(self) -> int:
        """Capacity that is left to hand out, in percent; 0 only when a claim would be refused."""
        host = self.agent.host()
        slots = self.agent.slots
        free = slots.count(SlotState.WARM) + slots.count(SlotState.STARTING) + self._room(host)
        return min(100, math.ceil(100 * free / host.capacity)) if not host.draining else 0

    def _room(self, host: admission.Host) -> int:
        """How many more slots of the default image may be started."""
        default = self.agent.config.pool.image
        return admission.room(host, self.agent.zygotes.launch(default)) if default in self.agent.pools else 0

    def _live(self, slot_id: str) -> RunningSlot:
        live = self.agent.slots.get(slot_id)
        if live is None:
            raise SlotNotFound(f"no slot {slot_id} lives on this host", slot=slot_id)
        return live

    def _bounds(self) -> Bounds:
        config = self.agent.config
        slots = config.slots
        return Bounds(slots.memory_max, slots.ttl_max, self.agent.cpus, config.network.allow, config.claims.archives)

    def _claimed_image(self, options: Options) -> str:
        name = options.image or self.agent.config.pool.image
        state = self.agent.pools.get(name)
        if state is not None and state.image is not None:
            return name
        known = ", ".join(image["name"] for image in self.images()) or "none yet"
        if options.image is None:
            raise ImageNotFound(f"the default image {name} is not on this host; on it are: {known}", image=name)
        raise InvalidField(field="image", value=name, expected=f"an image of this host: {known}")

    def _retry_after_s(self) -> int:
        next_end_s = self._next_end_s()
        return 1 if next_end_s is None else max(1, min(RETRY_MAX_S, math.ceil(next_end_s)))

    def _next_end_s(self) -> float | None:
        """Seconds until the first slot in use is too old, None without one.

        Looked for once a second, as many are refused when the host is full.
        """
        at_s = now()
        if at_s >= self._looked_s + 1:
            ends = [live.slot.expires_s for live in self.agent.slots.values() if live.slot.expires_s is not None]
            self._first_end_s, self._looked_s = min(ends, default=None), at_s
        return None if self._first_end_s is None else max(0.0, round(self._first_end_s - at_s, 1))

    def _slot_gone(self, slot: Slot) -> None:
        if slot.key is not None and slot.key in self.keys and self._is_spent(self.keys[slot.key][1]):
            del self.keys[slot.key]


def _fresh(live: RunningSlot) -> dict[str, Any]:
    at_s = now()
    return live.document(at_s, at_s)


def _check_network(options: Options, network: str, allowed: tuple[str, ...]) -> None:
    """Refuses an archive that the slot's network does not reach. Raises InvalidField."""
    archive = options.content.archive
    # Loopback is the slot's own in every mode.
    if archive is None or network == INTERNET or urls.parse(archive).is_loopback():
        return
    if INTERNET in allowed:
        expected = f'"{INTERNET}", as a slot fetches its archive itself'
        raise InvalidField(field="network", value=network, expected=expected)
    raise InvalidField(
        field="archive", value=archive[:80],
        expected="no archive, as a slot fetches it itself, and network.allow of this host's configuration lets none",
    )


def _fingerprint(given: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(given, sort_keys=True, default=str).encode()).hexdigest()
