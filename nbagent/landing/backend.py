# SPDX-License-Identifier: BSD-3-Clause
"""The interface between the landing page and the slots behind it, and the figures that every visitor may see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from nbagent.config.host_config import HostConfig
from nbagent.core.documents import Claim, Durations, PublicFigures, SlotDefaults, Stats

RETRY_MIN_S, RETRY_MAX_S, RETRY_DEFAULT_S = 2, 60, 10


class SlotBackend(Protocol):
    """A host, or a fleet of hosts. The methods raise NbagentError."""

    def stats(self) -> Mapping[str, object]:
        """HostFigures; of a fleet the sums of its hosts, and under `hosts` the figures of each."""

    def claim(self, options: Mapping[str, object], key: str | None, client: str, trace: str) -> Claim:
        """Claims a slot for the address `client`; the same `key` gets the same slot. `trace` is that of web.trace.

        Raises Full with `retry_after_s`.
        """

    def lend(self, options: Mapping[str, object], client: str) -> Claim | None:
        """Lends a slot to the address `client` for a minute; None if no slot is lent now."""

    def keep(self, slot: str, token: str, client: str) -> None:
        """Makes a lent slot a claimed one. Raises SlotNotFound."""

    def give_back(self, slot: str, token: str, client: str) -> None:
        """Ends a slot that is still lent. Raises SlotNotFound."""

    def origin(self, slot: str, host: str, scheme: str) -> str:
        """The origin of a slot, such as `https://nb.example.org`, for a visitor who reached `host` by `scheme`."""

    def has_origins(self) -> bool:
        """Whether each slot has an origin of its own, so that links to it cannot be relative."""

    def can_prerender(self, host: str, scheme: str) -> bool:
        """Whether a browser prerenders pages of slots for a page that it has from `host` by `scheme`."""


def public_figures(stats: Stats) -> PublicFigures:
    """The part of the supervisor's stats that is not confidential."""
    return {
        "available": stats["available"], "capacity": stats["capacity"], "version": stats["version"],
        "container_image": stats["container_image"], "assets": stats.get("assets"), "label": stats["label"],
        "warm": stats["warm"],
        "starting": stats["starting"], "draining": stats["draining"], "free_percent": stats["free_percent"],
        "ready": stats["ready"], "next_end_s": stats["next_end_s"], "uptime_s": stats["uptime_s"],
        "in_use": stats["claimed"],
        "claims": stats["counters"]["claims"],
        "claim_ms": {"p50": quantile_ms(stats["claim_seconds"], .5), "p99": quantile_ms(stats["claim_seconds"], .99)},
    }


def quantile_ms(histogram: Durations, share: float) -> float | None:
    """The quantile `share` of a cumulative histogram in ms, None when it is empty.

    Durations are taken as evenly spread between two bounds; one above the last bound counts as that bound.
    """
    rank = share * histogram["count"]
    if not rank:
        return None
    lower_s, lower_count = 0.0, 0
    for bound_s, count in sorted((float(bound), count) for bound, count in histogram["buckets"].items()):
        if count >= rank:
            quantile_s = lower_s + (bound_s - lower_s) * (rank - lower_count) / (count - lower_count)
            return round(1000.0 * quantile_s, 1)
        lower_s, lower_count = bound_s, count
    return round(1000 * lower_s, 1)


def retry_delay_s(figures: Mapping[str, object], retry_after_s: object) -> int:
    """Seconds until a refused claim should be sent again: `retry_after_s` of the refusal, else when a slot may end."""
    for delay_s in (retry_after_s, figures.get("next_end_s")):
        if isinstance(delay_s, (int, float)) and not isinstance(delay_s, bool):
            return max(RETRY_MIN_S, min(RETRY_MAX_S, math.ceil(delay_s)))
    return RETRY_DEFAULT_S


def slot_defaults(config: HostConfig) -> SlotDefaults:
    """When a slot that is claimed without options ends, and what it may use."""
    return {
        "idle_s": config.cull.idle, "life_s": config.slots.ttl, "memory_bytes": config.slots.memory,
        "internet": config.network_mode(config.pool.image) == "internet",
    }
