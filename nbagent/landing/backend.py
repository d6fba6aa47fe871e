"""What the landing page stands in front of, and the figures of it that everybody may see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from nbagent.config.host_config import HostConfig


class SlotBackend(Protocol):
    """A host, or a fleet of them. Its calls raise NbagentError."""

    def stats(self) -> dict[str, Any]:
        """The figures that `public_figures` makes; of a fleet their sums, and under `hosts` those of each host."""

    def claim(self, options: Mapping[str, Any], key: str | None, client: str) -> Mapping[str, Any]:
        """Hands out a slot to the address `client`; the same one for the same `key`.

        The document has `slot`, `path` and `query`, as `model.Slot.claim_document` writes them.
        Raises Full with `retry_after_s`.
        """

    def origin(self, slot: str, host: str, scheme: str) -> str:
        """Where a slot is served, such as `https://nb.example.org`, to somebody who called `host` by `scheme`."""

    def has_origins(self) -> bool:
        """Whether each slot is an origin of its own, so that links to it are never relative."""


def public_figures(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Of the supervisor's stats what is no secret: tmpnb's four, and what a picture of the host needs.

    `next_end_s` is when the first slot in use ends at the latest, None when there is none. `claim_ms` are
    the middle and the slowest hundredth of the answers to claims since the supervisor started.
    """
    names = ("available", "capacity", "version", "container_image", "label", "warm", "starting", "draining",
             "free_percent", "ready", "next_end_s", "uptime_s")
    return {name: stats[name] for name in names} | {
        "in_use": stats["claimed"],
        "claims": stats["counters"]["claims"],
        "claim_ms": {name: quantile_ms(stats["claim_seconds"], share) for name, share in (("p50", .5), ("p99", .99))},
    }


def quantile_ms(histogram: Mapping[str, Any], share: float) -> float | None:
    """The time, in ms, within which `share` of what a cumulative histogram counted was done; None of nothing.

    Between two bounds the observations are taken for evenly spread; what is beyond the last counts as that.
    """
    wanted = share * int(histogram["count"])
    if not wanted:
        return None
    below_s, below = 0.0, 0
    for bound, count in sorted((float(bound), int(count)) for bound, count in histogram["buckets"].items()):
        if count >= wanted:
            at_s = below_s + (bound - below_s) * (wanted - below) / (count - below)
            return round(1000.0 * at_s, 1)
        below_s, below = bound, count
    return round(1000 * below_s, 1)


def again_s(figures: Mapping[str, Any], retry_after_s: object) -> int:
    """Seconds after which it is worth to ask again: what was said with the refusal, else when a slot may end."""
    for said in (retry_after_s, figures.get("next_end_s")):
        if isinstance(said, (int, float)) and not isinstance(said, bool):
            return max(2, min(60, math.ceil(said)))
    return 10


def terms(config: HostConfig) -> dict[str, Any]:
    """What somebody who starts a slot here should know: how long it lives, and what it may use."""
    return {
        "idle_s": config.cull.idle, "life_s": config.slots.ttl, "memory_bytes": config.slots.memory,
        "internet": config.network_mode(config.pool.image) == "internet",
    }
