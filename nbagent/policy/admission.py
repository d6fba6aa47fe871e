"""How many slots the host takes, and whether it takes one more. Pure."""

from __future__ import annotations

from dataclasses import dataclass

# What a start needs before its own limit can be relied on: a cold JupyterLab server has 65 MiB
# of its own (shared/facts.md), its launcher and first kernel the rest.
START_MEMORY_BYTES = 128 << 20
# Ids 1000 and up of an image's 65,536 are slots', with room left so that none is soon used again.
CAPACITY_MAX = 60000


@dataclass(frozen=True)
class Host:
    """The host at one moment. `live` counts every slot that is not gone, `starting` among them."""

    capacity: int
    live: int
    starting: int
    starts_max: int
    memory_available_bytes: int
    memory_reserve_bytes: int
    draining: bool


def capacity(configured: int | None, memory_bytes: int, slot_bytes: int, overcommit: float) -> int:
    """Slots at a time: as configured, or as many as `overcommit` times the memory promises."""
    if configured is not None:
        return configured
    return max(1, min(CAPACITY_MAX, int(memory_bytes * overcommit / max(1, slot_bytes))))


def room(host: Host) -> int:
    """How many more slots may be started now, by capacity and by memory; 0 when draining.

    Slots that are starting have not touched their memory yet, so it is set aside for them.
    """
    if host.draining:
        return 0
    spare = host.memory_available_bytes - host.memory_reserve_bytes - host.starting * START_MEMORY_BYTES
    return max(0, min(host.capacity - host.live, spare // START_MEMORY_BYTES))


def obstacle(host: Host) -> str:
    """Why there is no room, in words for a person."""
    if host.draining:
        return "the host is draining"
    if host.live >= host.capacity:
        return f"all {host.capacity} slots are in use"
    return f"only {host.memory_available_bytes >> 20} MiB of the host's memory are available"
