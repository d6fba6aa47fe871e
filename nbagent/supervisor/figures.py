# SPDX-License-Identifier: BSD-3-Clause
"""The figures of the host, as documents: its slots by state, its pools and zygotes, and the claims it can serve."""

from __future__ import annotations

import dataclasses
import math

import nbagent
from nbagent.config.host_config import CurrentConfig
from nbagent.core.model import SlotState, now
from nbagent.policy import admission
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.health import Health
from nbagent.supervisor.host_load import HostLoad
from nbagent.supervisor.pools import Pools
from nbagent.supervisor.resources import Resources
from nbagent.supervisor.slots import Slots
from nbagent.supervisor.zygotes import Zygotes

Document = dict[str, object]


class Figures:
    """The figures."""

    def __init__(
        self, config: CurrentConfig, slots: Slots, pools: Pools, load: HostLoad, health: Health, resources: Resources,
        zygotes: Zygotes, counters: Counters,
    ) -> None:
        self._config = config
        self._slots = slots
        self._pools = pools
        self._load = load
        self._health = health
        self._resources = resources
        self._zygotes = zygotes
        self._counters = counters

    def images(self) -> list[Document]:
        """The images of this host."""
        config = self._config.value
        return [
            {
                "name": name, "digest": pool.image.digest, "launch": pool.image.launch,
                "launch_now": self._zygotes.launch(name), "launch_reason": self._zygotes.reason(name),
                "warm": len(pool.warm), "wanted": self._pools.wanted(name),
                "default": name == config.pool.image,
            }
            for name, pool in sorted(self._pools.items()) if pool.image is not None
        ]

    def stats(self) -> Document:
        """The figures of the host."""
        config, host, at_s = self._config.value, self._load.host(), now()
        states = {state.value: self._slots.count(state) for state in SlotState}
        default = self._pools.get(config.pool.image)
        return {
            "version": nbagent.__version__,
            "label": config.label,
            "available": self._available(host),
            "capacity": host.capacity,
            **{state: states[state] for state in ("warm", "starting", "claimed", "stopping")},
            "draining": host.draining,
            "faults": dict(self._health.faults),
            "resources": dict(self._resources.free_percent),
            "pressure": dataclasses.asdict(host.pressure),
            "ready": (
                default is not None and default.image is not None and not default.failures and self._health.may_start()
            ),
            "container_image": config.pool.image,
            "assets": default.image.assets_path if default is not None and default.image is not None else None,
            "memory_available_bytes": host.memory_available_bytes,
            "free_percent": self._free_percent(host),
            "next_end_s": self._load.next_end_s(),
            "pools": {
                name: {
                    "wanted": self._pools.wanted(name), "warm": len(pool.warm),
                    "starting": self._slots.count(SlotState.STARTING, name), "failures": pool.failures,
                    "paused_s": max(0.0, round(pool.not_before_s - at_s, 1)),
                }
                for name, pool in sorted(self._pools.items())
            },
            "zygotes": self._zygotes.stats(),
            **self._counters.document(self._zygotes.counts),
            "uptime_s": round(now() - self._counters.started_s),
        }

    def free_percent(self) -> int:
        """The part of the capacity that claims can get, in percent; 0 only when a claim would be refused."""
        return self._free_percent(self._load.host())

    def _free_percent(self, host: admission.Host) -> int:
        available = self._available(host)
        return min(100, math.ceil(100 * available / host.capacity)) if available else 0

    def _available(self, host: admission.Host) -> int:
        """The claims that can get a slot: of those that are ready or start, and of the default image.

        While starts of the default image fail, or a part of the host that a start needs, only warm slots count, because
        other claims would wait until they fail.
        """
        if host.draining or not self._health.may_claim():
            return 0
        default = self._pools.get(self._config.value.pool.image)
        warm = self._slots.count(SlotState.WARM)
        if default is None or default.image is None or default.failures or not self._health.may_start():
            return warm
        return warm + self._slots.count(SlotState.STARTING) + self._load.room(host, default.image.name)
