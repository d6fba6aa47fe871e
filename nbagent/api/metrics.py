# SPDX-License-Identifier: BSD-3-Clause
"""The supervisor's stats in Prometheus' text format.

Each scrape makes a registry of its own, because the API has no state. Names of metrics are an
interface: dashboards and alerts break when one changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from nbagent.core.documents import Durations, Stats

MEDIA_TYPE = CONTENT_TYPE_LATEST
_State = Literal["starting", "warm", "claimed", "stopping"]
_Gauge = Literal["capacity", "available", "draining", "ready", "memory_available_bytes", "uptime_s"]
_PoolGauge = Literal["wanted", "warm", "starting", "failures", "paused_s"]
_ZygoteGauge = Literal["failures", "forks", "age_s"]
_Histogram = Literal["start_seconds", "claim_seconds"]
STATES: tuple[_State, ...] = ("starting", "warm", "claimed", "stopping")
_GAUGES: dict[_Gauge, tuple[str, str]] = {
    "capacity": ("nbagent_capacity", "Slots that may run at a time."),
    "available": ("nbagent_available", "Claims that would get a slot now."),
    "draining": ("nbagent_draining", "1 while the host hands out no slots."),
    "ready": ("nbagent_ready", "1 when slots of the default image start."),
    "memory_available_bytes": ("nbagent_memory_available_bytes", "Memory that is left for slots."),
    "uptime_s": ("nbagent_uptime_seconds", "Time since the supervisor started."),
}
_COUNTERS = {
    "claims": "Slots handed out.",
    "lent": "Slots lent to visitors of the landing page.",
    "lent_kept": "Lent slots that were claimed; claims counts them too.",
    "claims_refused": "Claims refused because the host was full or draining.",
    "starts": "Slots started.",
    "start_failures": "Slots that did not become ready.",
    "released": "Slots released by their owner.",
    "died": "Slots that ended by themselves.",
    "oom_kills": "Processes of slots that the kernel killed for memory.",
    "culled_idle": "Slots ended because they were idle.",
    "culled_age": "Slots ended because they were too old.",
    "culled_memory": "Slots ended because the kernel kept killing their processes for memory.",
    "compressed": "How often the memory of an idle slot was compressed.",
    "starts_fork": "Slots started by a fork of a zygote.",
    "starts_exec": "Slots started by exec.",
    "adopted": "Slots of the former supervisor that were adopted.",
    "removed": "Incomplete slots of the former supervisor that were removed.",
    "zygotes_ready": "Zygotes that became ready.",
    "zygotes_failed": "Zygotes that did not start, or failed.",
    "zygotes_adopted": "Zygotes of the former supervisor that were adopted.",
    "held": "How often a slot was kept from growing because the host's memory was short.",
    "gave_way": "How often the CPU weight of a slot was lowered because it computed while no processor was free.",
}
_POOL_GAUGES: dict[_PoolGauge, str] = {
    "wanted": "Warm slots that the pool should hold.",
    "warm": "Warm slots that the pool holds.",
    "starting": "Slots of the pool that are starting.",
    "failures": "Consecutive failures to start a slot of the pool.",
    "paused_s": "Time until the next start after failed ones.",
}
_ZYGOTE_GAUGES: dict[_ZygoteGauge, str] = {
    "failures": "Consecutive failures of zygotes of the image.",
    "forks": "Slots that the zygote has forked.",
    "age_s": "Time since the zygote was ready.",
}
# supervisor.health
PARTS = ("systemd", "router", "image", "records", "network")
_HISTOGRAMS: dict[_Histogram, str] = {
    "start_seconds": "Time from the decision to start a slot until it is warm.",
    "claim_seconds": "Time that a claim took in the supervisor.",
}


def render(stats: Stats) -> bytes:
    """The text of a scrape."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_StatsCollector(stats))
    return generate_latest(registry)


class _StatsCollector(Collector):
    def __init__(self, stats: Stats) -> None:
        self.stats = stats

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self.stats
        build = GaugeMetricFamily("nbagent_build_info", "Always 1.", labels=["version", "label"])
        build.add_metric([stats["version"], stats["label"]], 1)
        yield build
        slots = GaugeMetricFamily("nbagent_slots", "Slots by state.", labels=["state"])
        for state in STATES:
            slots.add_metric([state], stats[state])
        yield slots
        for gauge, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, value=float(stats[gauge]))
        for pool_gauge, text in _POOL_GAUGES.items():
            pools = GaugeMetricFamily(f"nbagent_pool_{_with_unit(pool_gauge)}", text, labels=["image"])
            for image, pool in stats["pools"].items():
                pools.add_metric([image], pool[pool_gauge])
            yield pools
        ready = GaugeMetricFamily("nbagent_zygote_ready", "1 when slots start by fork.", labels=["image"])
        for image, zygote in stats["zygotes"].items():
            ready.add_metric([image], zygote["state"] == "ready")
        yield ready
        for zygote_gauge, text in _ZYGOTE_GAUGES.items():
            zygotes = GaugeMetricFamily(f"nbagent_zygote_{_with_unit(zygote_gauge)}", text, labels=["image"])
            for image, zygote in stats["zygotes"].items():
                zygotes.add_metric([image], zygote[zygote_gauge])
            yield zygotes
        pressure = GaugeMetricFamily(
            "nbagent_pressure_percent", "Part of the last ten seconds in which a process waited (PSI).",
            labels=["resource"],
        )
        for resource, percent in stats["pressure"].items():
            pressure.add_metric([resource], percent)
        yield pressure
        works = GaugeMetricFamily(
            "nbagent_part_works", "0 when a part of the host that claims need fails.", labels=["part"]
        )
        for part in PARTS:
            works.add_metric([part], part not in stats["faults"])
        yield works
        resources = GaugeMetricFamily(
            "nbagent_resource_free_percent", "Part of a resource of the host that is left.", labels=["resource"]
        )
        for resource, percent in stats["resources"].items():
            resources.add_metric([resource], percent)
        yield resources
        for counter, text in _COUNTERS.items():
            yield CounterMetricFamily(f"nbagent_{counter}", text, value=stats["counters"][counter])
        for histogram, text in _HISTOGRAMS.items():
            yield _histogram(f"nbagent_{histogram}", text, stats[histogram])


def _with_unit(name: str) -> str:
    return f"{name.removesuffix('_s')}_seconds" if name.endswith("_s") else name


def _histogram(name: str, text: str, measured: Durations) -> HistogramMetricFamily:
    bounds = sorted(((bound, n) for bound, n in measured["buckets"].items() if bound != "+Inf"),
                    key=lambda bucket: float(bucket[0]))
    buckets = [*bounds, ("+Inf", measured["count"])]
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=measured["sum"])
