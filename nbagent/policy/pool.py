# SPDX-License-Identifier: BSD-3-Clause
"""The next moves of the pools: slots to start, and warm slots to retire. Pure.

A pool should have its number of warm slots, and one more for every claim that waits. A slot that is stale (of a former
image, too old, started while slots.ttl_max was shorter, or while no complete zygote forked) can still be claimed. It is
retired only when fresh slots have replaced it, so that the replacement of an image does not leave a pool empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nbagent.core.model import Slot
from nbagent.policy import admission
from nbagent.policy.admission import Host

# While a pool pauses and a claim waits, one start is tried so long after the last failure. A start by exec takes a
# second of a processor, so that an image that never starts takes a quarter of one while there are claims.
TRY_S = 3.0


@dataclass(frozen=True)
class Pool:
    """The pool of one image. `digest` is None when the store no longer has the image.

    `launch` is "fork" or "exec", and `launch_reason` why no complete zygote forks slots now. `warming`: a zygote is
    being started, and none forks; until it is ready slots start by exec, for claims that wait only, because a forked
    slot takes a tenth of the memory, and each start by exec as much processor time as half of a quick zygote's.
    `paused_s` are the seconds until the next start may be tried, and `failed_ago_s` those since the last one failed.
    """

    image: str
    digest: str | None
    launch: str
    wanted: int
    warm: Sequence[Slot]
    starting: int
    waiting: int
    paused_s: float = 0.0
    failed_ago_s: float = math.inf
    warming: bool = False
    launch_reason: str = ""


@dataclass(frozen=True)
class Retire:
    """A warm slot to end, and the reason."""

    id: str
    reason: str


@dataclass(frozen=True)
class Decision:
    """The moves. `start` has an image once for every slot to start, the most urgent first."""

    start: tuple[str, ...]
    retire: tuple[Retire, ...]


def decide(pools: Sequence[Pool], host: Host, now_s: float, max_age_s: float, life_s: float) -> Decision:
    """The next moves of all pools of a host, within its capacity, memory and bound on starts.

    A fresh slot has waited for `max_age_s` at most, and can be claimed for `life_s` seconds.
    """
    if host.draining:
        return Decision((), tuple(Retire(slot.id, "the host drains") for pool in pools for slot in pool.warm))
    # One pass over the warm slots, because this runs at each event and there may be a thousand. Those with a reason
    # were started by exec or by a quick zygote, and take more time and memory than it takes to replace them.
    oldest_s, least_s = now_s - max_age_s, now_s + life_s
    fresh = {
        pool.image: [
            slot for slot in pool.warm
            if slot.digest == pool.digest and slot.created_s >= oldest_s and slot.ends_s >= least_s
            and (not slot.launch_reason or pool.launch_reason)
        ]
        for pool in pools
    }
    retire = [
        move for pool in pools
        for move in _retire(pool, fresh[pool.image], admission.room(host, pool.launch) == 0)
    ]
    missing = {
        pool.image: _missing(pool, len(fresh[pool.image])) if pool.paused_s <= 0 else 1
        for pool in pools if pool.paused_s <= 0 or _may_try(pool)
    }
    waiting = {pool.image: pool.waiting for pool in pools}
    launches = {pool.image: pool.launch for pool in pools}
    # Starts under way are for claims that wait first.
    for_claims = {pool.image: max(0, pool.waiting - pool.starting) for pool in pools}
    under_way, most = sum(pool.starting for pool in pools), admission.pool_starts(host)
    start: list[str] = []
    while True:
        image = max(missing, key=lambda name: (waiting[name] > 0, missing[name]), default=None)
        if image is None or missing[image] <= 0 or not admission.may_start(host, launches[image]):
            break
        if for_claims[image] <= 0 and most is not None and under_way >= most:
            break
        start.append(image)
        under_way += 1
        for_claims[image] -= 1
        host = admission.started(host, launches[image])
        missing[image] -= 1
        waiting[image] -= 1
    return Decision(tuple(start), tuple(retire))


def backoff(failures: int, first_s: float, longest_s: float) -> float:
    """The pause after `failures` failed starts in a row: doubling, bounded."""
    return min(longest_s, first_s * 2.0 ** min(failures - 1, 32)) if failures else 0.0


def _may_try(pool: Pool) -> bool:
    """Whether one start is tried for a claim although the pool pauses, because the cause may have been mended."""
    return pool.digest is not None and pool.waiting > 0 and pool.starting == 0 and pool.failed_ago_s >= TRY_S


def _missing(pool: Pool, fresh: int) -> int:
    if pool.digest is None:
        return 0
    return (0 if pool.warming else pool.wanted) + pool.waiting - fresh - pool.starting


def _retire(pool: Pool, fresh: Sequence[Slot], no_room: bool) -> Iterable[Retire]:
    if pool.digest is None:
        yield from (Retire(slot.id, "its image was removed") for slot in pool.warm)
        return
    if len(fresh) < len(pool.warm) and (len(fresh) >= pool.wanted or no_room):
        known = {slot.id for slot in fresh}
        stale = [slot for slot in pool.warm if slot.id not in known]
        # Without room, one at a time, because each makes the room for its own replacement.
        for slot in stale[:1] if no_room and len(fresh) < pool.wanted else stale:
            yield Retire(slot.id, _reason(pool, slot))
    if pool.waiting == 0 and len(fresh) > pool.wanted:
        oldest_first = sorted(fresh, key=lambda slot: slot.created_s)
        surplus = len(fresh) - pool.wanted
        yield from (Retire(slot.id, "the pool is smaller now") for slot in oldest_first[:surplus])


def _reason(pool: Pool, slot: Slot) -> str:
    """Why a slot is stale."""
    if slot.digest != pool.digest:
        return "its image was replaced"
    if slot.launch_reason and not pool.launch_reason:
        return f"a complete zygote has forked its replacement, but when it was started: {slot.launch_reason}"
    return "it is too old to be claimed"
