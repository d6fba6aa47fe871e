"""How many slots the host takes, and whether it takes one more. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

# Ids 1000 and up of an image's 65,536 are slots', with room left so that none is soon used again.
CAPACITY_MAX = 60000


@dataclass(frozen=True)
class Cost:
    """What a start takes while it is under way: processors, and memory that it has not touched yet."""

    processors: float
    memory_bytes: int


# By a slot's `launch`. A cold JupyterLab server computes all the time until it is ready and has 65 MiB of its own, its
# launcher and first kernel the rest. A forked one computes for 10 ms, and waits longer than that for PID 1; it has
# 7 MiB (shared/facts.md), its first kernel the rest.
COSTS = {"exec": Cost(1.0, 128 << 20), "fork": Cost(0.25, 24 << 20)}


@dataclass(frozen=True)
class Host:
    """The host at one moment.

    `live` counts every slot that is not gone. `starts` is what the starts under way take together, `starts_max`
    how many processors they may take.
    """

    capacity: int
    live: int
    starts: Cost
    starts_max: float
    memory_available_bytes: int
    memory_reserve_bytes: int
    draining: bool


def under_way(starting: Mapping[str, int]) -> Cost:
    """What starts take together; `starting` is how many there are, by their `launch`."""
    return Cost(
        sum(COSTS[launch].processors * count for launch, count in starting.items()),
        sum(COSTS[launch].memory_bytes * count for launch, count in starting.items()),
    )


def capacity(configured: int | None, memory_bytes: int, slot_bytes: int, overcommit: float) -> int:
    """Slots at a time: as configured, or as many as `overcommit` times the memory promises."""
    if configured is not None:
        return configured
    return max(1, min(CAPACITY_MAX, int(memory_bytes * overcommit / max(1, slot_bytes))))


def room(host: Host, launch: str) -> int:
    """How many more slots may be started so, by capacity and by memory, one after the other; 0 when draining.

    Slots that are starting have not touched their memory yet, so it is set aside for them.
    """
    if host.draining:
        return 0
    spare = host.memory_available_bytes - host.memory_reserve_bytes - host.starts.memory_bytes
    return max(0, min(host.capacity - host.live, spare // COSTS[launch].memory_bytes))


def may_start(host: Host, launch: str) -> bool:
    """Whether one more may begin now, beside the starts that are under way."""
    return host.starts.processors + COSTS[launch].processors <= host.starts_max and room(host, launch) > 0


def started(host: Host, launch: str) -> Host:
    """The host with one start more under way."""
    cost = COSTS[launch]
    starts = Cost(host.starts.processors + cost.processors, host.starts.memory_bytes + cost.memory_bytes)
    return replace(host, live=host.live + 1, starts=starts)


def may_wait(image: str, short: Mapping[str, int], room: int, ending: int) -> bool:
    """Whether one more claim of `image` has a slot to wait for.

    `short` is by image how many claims wait, less the slots that start: these go to claims first. `room` is for how
    many more, and each of the `ending` slots makes room for another.
    """
    own = short[image] + 1
    others = sum(max(0, claims) for name, claims in short.items() if name != image)
    return own <= 0 or own + others <= room + ending


def obstacle(host: Host) -> str:
    """Why there is no room, in words for a person."""
    if host.draining:
        return "the host is draining"
    if host.live >= host.capacity:
        return f"all {host.capacity} slots are in use"
    return f"only {host.memory_available_bytes >> 20} MiB of the host's memory are available"
