# SPDX-License-Identifier: BSD-3-Clause
"""The capacity of the host, and whether it can start one more slot. Pure.

This module alone owns the number of slots that fit, for the supervisor and for `nbagent doctor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

# An image has 65,536 user ids, and those from 2000 up are for slots. Some are spare, so that an id is not reused soon.
CAPACITY_MAX = 60000
# A claimed slot is expected to take a quarter more than the mean of those that are claimed. The mean includes so many
# slots of a first guess, so that the first few users of a host decide little. A slot at rest with one kernel takes
# 15 MiB (packaging/docs/benchmarks.md), and none is expected to take less than twice as much.
MARGIN, GUESSED_SLOTS, GUESS_BYTES = 1.25, 8, 96 << 20
REST_BYTES, LEAST_BYTES = 15 << 20, 32 << 20
# Memory that no start takes, so that a few users can take all of their limit at once: the limits of so many slots, but
# at most this part of the host. Growth is expected to go on for so long.
BURST_SLOTS, BURST_MAX = 4, 1 / 6
GROWTH_S = 60.0
# Percent of the last ten seconds in which a task waited. From there on a pool is filled by one start at a time, because
# users' processes wait as well. A claim that waits for a slot has its start in any case.
CPU_STRAIN, IO_STRAIN = 70.0, 50.0
# A few percent of waiting for memory mean that the kernel reclaims what processes still use.
MEMORY_STRAIN = 10.0


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
class Pressure:
    """The pressure stall information of the kernel (avg10 of "some"): the percent of the last ten seconds in which at
    least one task waited for a processor, for memory or for a disk. 0 with a kernel that does not measure it.
    """

    cpu: float = 0.0
    memory: float = 0.0
    io: float = 0.0


@dataclass(frozen=True)
class Host:
    """The host at one moment.

    `live` counts all slots until they are removed. `starts` is the cost of all starts under way, `starts_max` the
    number of processors that they may use. `kept_bytes` is the memory that starts leave to users who grow.
    """

    capacity: int
    live: int
    starts: Cost
    starts_max: float
    memory_available_bytes: int
    memory_reserve_bytes: int
    draining: bool
    pressure: Pressure = Pressure()
    kept_bytes: int = 0


def under_way(starting: Mapping[str, int]) -> Cost:
    """The cost of starts together; `starting` is their number by `launch`."""
    return Cost(
        sum(COSTS[launch].processors * count for launch, count in starting.items()),
        sum(COSTS[launch].memory_bytes * count for launch, count in starting.items()),
    )


@dataclass(frozen=True)
class MemoryUse:
    """The memory that the slots of the host take: all `memory_bytes`, of which `claimed` slots have nearly all.

    It grows by `growth_bytes_s` in addition to the memory of new slots.
    """

    claimed: int = 0
    memory_bytes: int = 0
    growth_bytes_s: float = 0.0


def promised(memory_bytes: int, slot_bytes: int, overcommit: float) -> int:
    """The number of slots that fit by their limits: `overcommit` times the memory of the host, divided by one limit.

    host.memory_reserve has no part in it, because it is compared with the available memory at each start.
    """
    return max(1, min(CAPACITY_MAX, int(memory_bytes * overcommit / max(1, slot_bytes))))


def fitting(
    live: int, use: MemoryUse, memory_bytes: int, available_bytes: int, reserve_bytes: int, slot_bytes: int,
    pressure: Pressure = Pressure(),
) -> int:
    """The number of slots that fit by what slots really use: the `live` ones, and more as the available memory allows.

    A host whose users all take their limit at once is short of memory nevertheless: nbagent.policy.memory_guard.
    """
    growth_bytes = round(use.growth_bytes_s * GROWTH_S)
    kept_bytes = reserve_bytes + burst_bytes(memory_bytes, slot_bytes)
    if is_short(pressure, available_bytes, kept_bytes):
        return max(1, min(CAPACITY_MAX, live))
    spare_bytes = available_bytes - kept_bytes - growth_bytes
    return max(1, min(CAPACITY_MAX, live + max(0, spare_bytes // expected_bytes(use))))


def expected_bytes(use: MemoryUse) -> int:
    """The memory that one more claimed slot is expected to take."""
    mean_bytes = (use.memory_bytes + GUESSED_SLOTS * GUESS_BYTES) / (use.claimed + GUESSED_SLOTS)
    return max(LEAST_BYTES, round(mean_bytes * MARGIN))


def burst_bytes(memory_bytes: int, slot_bytes: int) -> int:
    """Memory that stays available for users who take all of their limit."""
    return min(BURST_SLOTS * slot_bytes, round(memory_bytes * BURST_MAX))


def most(memory_bytes: int, reserve_bytes: int, slot_bytes: int) -> int:
    """The number of slots that `fitting` reaches when all are at rest."""
    spare_bytes = memory_bytes - reserve_bytes - burst_bytes(memory_bytes, slot_bytes)
    return max(1, min(CAPACITY_MAX, spare_bytes // REST_BYTES))


def is_short(pressure: Pressure, available_bytes: int, kept_bytes: int) -> bool:
    """Whether processes wait for memory because the host has little.

    A slot that uses all of its own limit waits for memory as well, on a host with plenty; so the pressure counts only
    while less than twice the memory is available that starts leave.
    """
    return pressure.memory >= MEMORY_STRAIN and available_bytes < 2 * kept_bytes


def pool_starts(host: Host) -> int | None:
    """How many starts without a claim may be under way at a time; None: as many as `may_start` allows."""
    if is_short(host.pressure, host.memory_available_bytes, host.kept_bytes):
        return 0
    return 1 if host.pressure.cpu >= CPU_STRAIN or host.pressure.io >= IO_STRAIN else None


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
