# SPDX-License-Identifier: BSD-3-Clause
"""Claims: a warm slot gets an owner, once for each Idempotency-Key.

A key is in the record of its slot, so a repeated claim gets the same slot after a restart of the supervisor too. A key
whose slot has ended may be used for a new claim.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from nbagent.config.host_config import CurrentConfig, HostConfig
from nbagent.core import urls
from nbagent.core.errors import Draining, Full, IdempotencyMismatch, ImageNotFound, InvalidField, NbagentError
from nbagent.core.events import Event, emit
from nbagent.core.model import CLAIM_FIELDS, Bounds, Options, Slot, SlotState, now, parse_options
from nbagent.policy import lending
from nbagent.supervisor.allocator import Allocator
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.crash_points import Point, reach
from nbagent.supervisor.host_load import RETRY_MAX_S, HostLoad
from nbagent.supervisor.network import INTERNET
from nbagent.supervisor.pools import Pools
from nbagent.supervisor.preparation import Preparation
from nbagent.supervisor.records import Records
from nbagent.supervisor.sessions import Sessions
from nbagent.supervisor.slots import Slots


class Request(NamedTuple):
    """A claim whose options are valid. `fingerprint` is equal for equal options."""

    image: str
    options: Options
    network: str
    ttl_s: float
    key: str
    fingerprint: str
    client: str
    trace: str
    lent: bool = False


class Pending(NamedTuple):
    """A claim under way, which further callers with its key wait for."""

    fingerprint: str
    slot: asyncio.Future[Slot]


class Claims:
    """Claims slots."""

    def __init__(
        self, config: CurrentConfig, slots: Slots, pools: Pools, records: Records, load: HostLoad,
        allocator: Allocator, preparation: Preparation, counters: Counters, sessions: Sessions,
        changed: asyncio.Event,
    ) -> None:
        self._config = config
        self._slots = slots
        self._pools = pools
        self._records = records
        self._load = load
        self._allocator = allocator
        self._preparation = preparation
        self._counters = counters
        self._sessions = sessions
        self._changed = changed
        self._pending: dict[str, Pending] = {}

    async def claim(self, given: Mapping[str, object], key: str, client: str, trace: str = "") -> Slot:
        """Claims a slot; the same one for the same key, as long as it lives. `trace` is that of web.trace.

        Raises InvalidField, ImageNotFound, Draining, Full, NotReady, StartFailed, RecordFailed, ContentFailed or
        IdempotencyMismatch.
        """
        began_s = now()
        try:
            slot = await self._claim_once(self._request(given, key, client, trace))
        except NbagentError as error:
            self._counters.add("claims_refused")
            if isinstance(error, Full):
                emit(Event.HOST_FULL, text=str(error))
            raise
        self._counters.claim_seconds.observe(now() - began_s)
        return slot

    async def lend(self, given: Mapping[str, object], key: str, client: str) -> Slot:
        """Claims a slot with the life of a lent one. Raises what `claim` raises."""
        return await self._claim_once(self._request(given, key, client, "")._replace(lent=True))

    def _request(self, given: Mapping[str, object], key: str, client: str, trace: str) -> Request:
        config = self._config.value
        options = parse_options(given, CLAIM_FIELDS, bounds(config, self._load.cpus))
        image = self._image(options)
        network = options.network or config.network_mode(image)
        _check_network(options, network, config.network.allow)
        fingerprint = hashlib.sha256(json.dumps(given, sort_keys=True, default=str).encode()).hexdigest()
        return Request(image, options, network, options.ttl_s or config.slots.ttl, key, fingerprint, client, trace)

    def _image(self, options: Options) -> str:
        name = options.image or self._config.value.pool.image
        pool = self._pools.get(name)
        if pool is not None and pool.image is not None:
            return name
        present = [name for name, pool in sorted(self._pools.items()) if pool.image is not None]
        known = ", ".join(present) or "none yet"
        if options.image is None:
            raise ImageNotFound(f"the default image {name} is not on this host; on it are: {known}", image=name)
        raise InvalidField(field="image", value=name, expected=f"an image of this host: {known}")

    async def _claim_once(self, request: Request) -> Slot:
        if (live := self._slots.claimed_by_key(request.key)) is not None:
            _check_fingerprint(request, live.slot.fingerprint or "")
            return live.slot
        if (pending := self._pending.get(request.key)) is not None:
            _check_fingerprint(request, pending.fingerprint)
            # Shielded, because the cancellation of one caller must not cancel the claim for the others.
            slot = await asyncio.shield(pending.slot)
            # Limits and life may have been updated since.
            return self._slots[slot.id].slot if slot.id in self._slots else slot
        claimed: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._pending[request.key] = Pending(request.fingerprint, claimed)
        try:
            slot = await self._claim(request)
        except asyncio.CancelledError:
            claimed.cancel()
            raise
        except BaseException as error:
            claimed.set_exception(error)
            # Mark the exception as retrieved; otherwise asyncio logs a warning when no second caller waits.
            claimed.exception()
            raise
        finally:
            del self._pending[request.key]
        claimed.set_result(slot)
        return slot

    async def _claim(self, request: Request) -> Slot:
        if self._load.draining:
            raise Draining("the host is draining and hands out no slots", retry_after_s=RETRY_MAX_S)
        began_s = now()
        live = await self._allocator.allocate(request.image, request.ttl_s, request.network)
        options, claimed_s = request.options, now()
        limits = options.limits(live.slot.limits)
        await self._preparation.prepare(live, limits, request.network, options.content)
        self._preparation.record(
            live, SlotState.CLAIMED,
            limits=limits, claimed_s=claimed_s, ttl_s=lending.LENT_S if request.lent else request.ttl_s,
            path=options.path or live.slot.path, key=request.key, fingerprint=request.fingerprint,
            network=request.network, lent_to=request.client if request.lent else None,
        )
        reach(Point.CLAIM_RECORDED)
        self._preparation.close_interface(live)
        self._counters.add("lent" if request.lent else "claims")
        # Before the response, because a page may request the file as soon as the slot. It takes 40 us.
        self._sessions.claimed(live.slot)
        trace = _trace_fields(request.trace, took_s=now() - began_s, waited_s=claimed_s - began_s)
        # In the loop's next turn, as is the start of the slot's replacement, so that the response is sent first.
        asyncio.get_running_loop().call_soon(
            partial(
                emit, Event.SLOT_LENT if request.lent else Event.SLOT_CLAIMED, slot=live.slot.id,
                client=request.client, ttl_s=f"{live.slot.ttl_s:g}", image=live.slot.image, network=request.network,
                **limits.document(), **trace,
            )
        )
        self._changed.set()
        return live.slot


def bounds(config: HostConfig, cpus: int) -> Bounds:
    """The bounds of the options of a claim or an update."""
    slots = config.slots
    return Bounds(slots.memory_max, slots.ttl_max, cpus, config.network.allow, config.claims.archives)


def _trace_fields(trace: str, *, took_s: float, waited_s: float) -> dict[str, str | int]:
    """The fields of an event for a trace, by the names of OpenTelemetry, and its times for `nbagent traces`."""
    if not trace:
        return {}
    trace_id, _, parent_id = trace.partition("-")
    times = {"took_us": round(took_s * 1e6), "waited_us": round(waited_s * 1e6)}
    return {"trace_id": trace_id, "parent_span_id": parent_id, **times}


def _check_fingerprint(request: Request, fingerprint: str) -> None:
    if request.fingerprint != fingerprint:
        raise IdempotencyMismatch("this Idempotency-Key was used with other options", field="Idempotency-Key")


def _check_network(options: Options, network: str, allowed: tuple[str, ...]) -> None:
    """Refuses an archive that the slot's network does not reach. Raises InvalidField."""
    archive = options.content.archive
    # A slot reaches its own loopback in every mode.
    if archive is None or network == INTERNET or urls.parse(archive).is_loopback():
        return
    if INTERNET in allowed:
        expected = f'"{INTERNET}", because a slot fetches its archive itself'
        raise InvalidField(field="network", value=network, expected=expected)
    raise InvalidField(
        field="archive", value=archive[:80],
        expected="no archive, because a slot fetches it itself and network.allow of this host's configuration has no"
                 f' "{INTERNET}"',
    )
