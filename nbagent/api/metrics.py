"""The supervisor's stats in Prometheus' text format.

The API has no state, so there is no registry that lives: each scrape makes one of the stats of
that moment. The names are an interface; a dashboard breaks when one changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

MEDIA_TYPE = CONTENT_TYPE_LATEST
STATES = ("starting", "warm", "claimed", "stopping")
_GAUGES = {
    "capacity": ("nbagent_capacity", "Slots that may run at a time."),
    "available": ("nbagent_available", "Claims that would be answered now."),
    "draining": ("nbagent_draining", "1 while the host hands out nothing."),
    "ready": ("nbagent_ready", "1 when the supervisor answers claims."),
    "memory_available_bytes": ("nbagent_memory_available_bytes", "Memory left for slots."),
    "uptime_s": ("nbagent_uptime_seconds", "Since the supervisor started."),
}
_COUNTERS = {
    "claims": "Slots handed out.",
    "claims_refused": "Claims refused because the host was full or draining.",
    "starts": "Slots started.",
    "start_failures": "Slots that did not become ready.",
    "released": "Slots released by their owner.",
    "died": "Slots that ended by themselves.",
    "oom_kills": "Processes of slots that the kernel killed for memory.",
    "culled_idle": "Slots ended because nobody used them.",
    "culled_age": "Slots ended because they were too old.",
    "culled_memory": "Slots ended because their processes were killed for memory on and on.",
    "compressed": "Times that the memory of a slot at rest was compressed.",
}
_POOL_GAUGES = {
    "wanted": "Warm slots that the pool should hold.",
    "warm": "Warm slots that the pool holds.",
    "starting": "Slots of the pool that start now.",
    "failures": "Starts that failed in a row.",
}
_HISTOGRAMS = {
    "start_seconds": "From the decision to start a slot until it is warm.",
    "claim_seconds": "How long a claim waited in the supervisor.",
}


def render(stats: Mapping[str, Any]) -> bytes:
    """The text of a scrape, of the document that the supervisor's `stats` answers."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_StatsCollector(stats))
    return generate_latest(registry)


class _StatsCollector(Collector):
    def __init__(self, stats: Mapping[str, Any]) -> None:
        self.stats = stats

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self.stats
        build = GaugeMetricFamily("nbagent_build_info", "Always 1.", labels=["version", "label"])
        build.add_metric([str(stats["version"]), str(stats["label"])], 1)
        yield build
        slots = GaugeMetricFamily("nbagent_slots", "Slots by state.", labels=["state"])
        for state in STATES:
            slots.add_metric([state], stats[state])
        yield slots
        for key, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, value=float(stats[key]))
        for key, text in _POOL_GAUGES.items():
            pools = GaugeMetricFamily(f"nbagent_pool_{key}", text, labels=["image"])
            for image, pool in stats["pools"].items():
                pools.add_metric([image], pool[key])
            yield pools
        for key, text in _COUNTERS.items():
            yield CounterMetricFamily(f"nbagent_{key}", text, value=stats["counters"][key])
        for key, text in _HISTOGRAMS.items():
            yield _histogram(f"nbagent_{key}", text, stats[key])


def _histogram(name: str, text: str, measured: Mapping[str, Any]) -> HistogramMetricFamily:
    """The buckets count what took at most so long, each including the ones below it."""
    bounds = sorted(((bound, n) for bound, n in measured["buckets"].items() if bound != "+Inf"),
                    key=lambda bucket: float(bucket[0]))
    buckets = [*bounds, ("+Inf", measured["count"])]
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=measured["sum"])
