# SPDX-License-Identifier: BSD-3-Clause
"""Counts and durations since the start of the supervisor, for /stats and /metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbagent.core.model import now

# Seconds. From a forked slot's 10 ms to a cold start on a loaded machine.
BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
COUNTERS = (
    "claims", "claims_refused", "starts", "start_failures", "released", "died", "oom_kills",
    "culled_idle", "culled_age", "culled_memory", "compressed", "held", "gave_way",
    "starts_fork", "starts_exec", "adopted", "removed", "lent", "lent_kept",
)


NO_OTHERS: Mapping[str, int] = {}


@dataclass
class Histogram:
    """Durations: cumulative counts by upper bound, as in a Prometheus histogram."""

    count: int = 0
    sum: float = 0.0
    buckets: dict[float, int] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 0))

    def observe(self, seconds: float) -> None:
        """Adds one observation."""
        self.count += 1
        self.sum += seconds
        for bound in BUCKETS:
            self.buckets[bound] += seconds <= bound

    def document(self) -> dict[str, object]:
        """The histogram as JSON."""
        return {"count": self.count, "sum": self.sum, "buckets": {str(k): v for k, v in self.buckets.items()}}


@dataclass
class Counters:
    """All counters, and the start time of the supervisor."""

    started_s: float = field(default_factory=now)
    values: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    start_seconds: Histogram = field(default_factory=Histogram)
    claim_seconds: Histogram = field(default_factory=Histogram)

    def add(self, name: str, amount: int = 1) -> None:
        """Adds to a counter. Raises KeyError for an unknown name."""
        self.values[name] += amount

    def document(self, others: Mapping[str, int] = NO_OTHERS) -> dict[str, object]:
        """All counters, with those of other objects, and histograms as JSON."""
        return {
            "counters": {**self.values, **others},
            "start_seconds": self.start_seconds.document(),
            "claim_seconds": self.claim_seconds.document(),
        }
