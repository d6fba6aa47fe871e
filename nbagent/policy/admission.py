# SPDX-License-Identifier: BSD-3-Clause
"""The capacity of the host, and whether it can start one more slot. Pure.

This module alone owns the number of slots that fit, for the supervisor and for `nbagent doctor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

# An image has 65,536 user ids, and those from 2000 up are for slots. Some are spare, so that an id is not reused soon.
CAPACITY_MAX = 60000


@dataclass(frozen=True)
class Cost:
    """The cost of a start under way: processors, and memory that it has not touched yet."""

    processors: float
    memory_bytes: int


# By a slot's `launch`. A JupyterLab server that starts by exec uses a processor until it is ready, and has 65 MiB of
# its own; the rest is for its launcher and its first kernel. A forked one uses a processor for 10 ms, waits longer than
# that for PID 1, and has 7 MiB of its own; the rest is for its first kernel.
COSTS = {"exec": Cost(1.0, 128 << 20), "fork": Cost(0.25, 24 << 20)}


@dataclass(frozen=True)
class Host:
    """The host at one moment.

    `live` counts all slots until they are removed. `starts` is the cost of all starts under way, `starts_max` the
    number of processors that they may use.
    """

    capacity: int
    live: int
    starts: Cost
    starts_max: float
    memory_available_bytes: int
    memory_reserve_bytes: int
    draining: bool


def under_way(starting: Mapping[str, int]) -> Cost:
    """The cost of starts together; `starting` is their number by `launch`."""
    return Cost(
        sum(COSTS[launch].processors * count for launch, count in starting.items()),
        sum(COSTS[launch].memory_bytes * count for launch, count in starting.items()),
    )


def capacity(configured: int | None, memory_bytes: int, slot_bytes: int, overcommit: float) -> int:
    """The number of slots that fit: slots.capacity, or, where that is "auto", by memory.

    Then `overcommit` times the host's memory is divided by the memory of one slot. host.memory_reserve has no part in
    it, because it is compared with the available memory at each start.
    """
    if configured is not None:
        return configured
    return max(1, min(CAPACITY_MAX, int(memory_bytes * overcommit / max(1, slot_bytes))))


def room(host: Host, launch: str) -> int:
    """How many more slots may be started this way, by capacity and by memory; 0 when the host drains.

    The memory of slots that are starting is set aside, because they have not touched it yet.
    """
    if host.draining:
        return 0
    spare = host.memory_available_bytes - host.memory_reserve_bytes - host.starts.memory_bytes
    return max(0, min(host.capacity - host.live, spare // COSTS[launch].memory_bytes))


def may_start(host: Host, launch: str) -> bool:
    """Whether one more start may begin now, beside those under way."""
    return host.starts.processors + COSTS[launch].processors <= host.starts_max and room(host, launch) > 0


def started(host: Host, launch: str) -> Host:
    """The host with one start more under way."""
    cost = COSTS[launch]
    starts = Cost(host.starts.processors + cost.processors, host.starts.memory_bytes + cost.memory_bytes)
    return replace(host, live=host.live + 1, starts=starts)


def may_wait(image: str, short: Mapping[str, int], room: int, ending: int) -> bool:
    """Whether a slot can come for one more claim of `image`.

    `short` has, for each image, the number of claims that wait less the number of slots that start, because those go to
    claims first. `room` more slots may be started, and each of the `ending` slots makes room for another.
    """
    own = short[image] + 1
    others = sum(max(0, claims) for name, claims in short.items() if name != image)
    return own <= 0 or own + others <= room + ending


def obstacle(host: Host) -> str:
    """The reason why there is no room, as a part of an error text."""
    if host.draining:
        return "the host is draining"
    if host.live >= host.capacity:
        return f"all {host.capacity} slots are in use"
    return f"only {host.memory_available_bytes >> 20} MiB of the host's memory are available"
