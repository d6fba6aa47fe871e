# SPDX-License-Identifier: BSD-3-Clause
"""The JSON documents that the supervisor sends and that several HTTP services read, as types.

`api.openapi` describes the same documents to callers, and a test holds both against real responses.
"""

from __future__ import annotations

from typing import TypedDict


class Durations(TypedDict):
    """A cumulative histogram: `buckets` counts the durations of at most so many seconds, by bound."""

    count: int
    sum: float
    buckets: dict[str, int]


class PoolStats(TypedDict):
    """The warm slots of one image. `failures` are starts that failed in a row; the next may begin in `paused_s`."""

    wanted: int
    warm: int
    starting: int
    failures: int
    paused_s: float


class ZygoteStats(TypedDict):
    """The zygote of one image: "ready", "starting" or "none", and whether another is started to replace it."""

    state: str
    replacing: bool
    failures: int
    forks: int
    age_s: float


class Stats(TypedDict):
    """The response to `stats`: how full the host is, and what it has done since the supervisor started.

    `next_end_s` is the time until the first slot in use reaches its maximum age, None when no slot is in use. `faults`
    has the parts of the host that fail (supervisor.health), each with the error, `resources` the percent that is left
    of each resource of the host. `assets` is the path of the default image's web files, None when it has none.
    `pressure` has the percent of the last ten seconds in which a process waited, for "cpu", "memory" and "io".
    """

    version: str
    label: str
    container_image: str
    assets: str | None
    available: int
    capacity: int
    warm: int
    starting: int
    claimed: int
    stopping: int
    draining: bool
    ready: bool
    memory_available_bytes: int
    free_percent: int
    next_end_s: float | None
    uptime_s: float
    faults: dict[str, str]
    resources: dict[str, float]
    pressure: dict[str, float]
    pools: dict[str, PoolStats]
    zygotes: dict[str, ZygoteStats]
    counters: dict[str, int]
    start_seconds: Durations
    claim_seconds: Durations


class Trial(TypedDict):
    """A slot that was started as a trial, requested through the router, and ended."""

    slot: str
    launch: str
    launch_reason: str
    took_ms: int
    router_ms: int | None


class LimitsDocument(TypedDict):
    """Limits of a slot. `cpu_quota` counts processors, None: no quota."""

    memory_bytes: int
    cpu_weight: int
    cpu_quota: float | None
    tasks: int


class Claim(TypedDict):
    """The response to `claim`. The link to the slot consists of `path` and `query`, which has the token in it."""

    slot: str
    path: str
    query: str
    token: str
    image: str
    claimed_at: str | None
    expires_at: str | None
    network: str
    limits: LimitsDocument


class SlotStatus(TypedDict):
    """One slot, without its token. The resources it uses, and the limits in force while its host has lowered some, are
    further fields (api.openapi).
    """

    slot: str
    state: str
    image: str
    created_at: str | None
    claimed_at: str | None
    expires_at: str | None
    age_s: float
    launch: str
    launch_reason: str
    network: str
    limits: LimitsDocument


class Drain(TypedDict):
    """Whether the host drains."""

    draining: bool
    claimed: int
    warm: int


class Recycled(TypedDict):
    """How many warm slots were ended."""

    drained: int


class ImageStatus(TypedDict):
    """An image of the host, and its pool. `launch` is that of its manifest; `launch_now` is "exec" without a zygote,
    and `launch_reason` is why, or why a quick zygote forks."""

    name: str
    digest: str
    launch: str
    launch_now: str
    launch_reason: str
    warm: int
    wanted: int
    default: bool


class ClaimMilliseconds(TypedDict):
    """How long claims took: the median and the 99th percentile, None without any claim."""

    p50: float | None
    p99: float | None


class PublicFigures(TypedDict):
    """The figures of a host that every visitor may see: tmpnb's four, and those that the pages need.

    `assets` is the address of the default image's web files, a path or a URL.
    """

    available: int
    capacity: int
    version: str
    container_image: str
    assets: str | None
    label: str
    warm: int
    starting: int
    draining: bool
    free_percent: int
    ready: bool
    next_end_s: float | None
    uptime_s: float
    in_use: int
    claims: int
    claim_ms: ClaimMilliseconds


class SlotDefaults(TypedDict):
    """A slot that is claimed without options: when it ends, its memory, and whether it reaches the internet."""

    idle_s: float
    life_s: float
    memory_bytes: int
    internet: bool


class HostFigures(PublicFigures, SlotDefaults):
    """The response to `GET /api/stats` of a host."""
