# SPDX-License-Identifier: BSD-3-Clause
"""The fleet as the landing page's SlotBackend: figures that are fetched from the hosts, and their sums.

Figures are cached for a second. The list of hosts comes from HAProxy, so the page and the routing of claims and users
always use the same hosts. The fleet hands out no slot: HAProxy sends a claim here only after the hosts refused it.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from nbagent import __version__
from nbagent.core.errors import Full, SlotNotFound
from nbagent.gateway.runtime import GatewayDown, HaproxyServer

# Clients may request the figures at any rate; the hosts get one request in this time.
FIGURES_AGE_S = 1.0
DEADLINE_S = 1.5
# Each host that is slow to respond occupies a thread.
THREADS = 64
_RESPONSE_MAX_BYTES = 1 << 20
_SUMS = ("available", "capacity", "in_use", "warm", "starting", "claims")

Figures = dict[str, Any]
DOWN: Figures = {"available": 0, "capacity": 0, "down": True}


class FleetBackend:
    """The hosts of `list_hosts`, which raises GatewayDown; `fetch` returns a host's figures, or None on failure."""

    def __init__(
        self,
        list_hosts: Callable[[], Sequence[HaproxyServer]],
        fetch: Callable[[HaproxyServer], Figures | None] | None = None,
    ) -> None:
        self.list_hosts = list_hosts
        self.fetch = fetch or fetch_figures
        self._lock = threading.Lock()
        self._figures: Figures = {}
        self._fetched_s = -FIGURES_AGE_S
        self._threads: ThreadPoolExecutor | None = None

    def stats(self) -> Figures:
        """The sums, and the figures of each host under `hosts`, at most a second old."""
        with self._lock:
            if time.monotonic() >= self._fetched_s + FIGURES_AGE_S:
                self._figures = total(self._fetch_all())
                self._fetched_s = time.monotonic()
            return self._figures

    def _fetch_all(self) -> dict[str, Figures]:
        # Created on first use, because threads of gunicorn's arbiter would not exist in the worker that it forks.
        self._threads = self._threads or ThreadPoolExecutor(THREADS)
        hosts = self.list_hosts()
        figures = self._threads.map(lambda host: None if host.is_down else self.fetch(host), hosts)
        # Keys have labels instead of addresses, because the figures are public.
        return {f"http://{host.label}": found or DOWN for host, found in zip(hosts, figures, strict=True)}

    def claim(self, options: Mapping[str, Any], key: str | None, client: str, trace: str) -> NoReturn:
        """Raises Full, because every host has refused the claim before."""
        figures = self.stats()
        raise Full(
            f"{figures['in_use']} of {figures['capacity']} slots of the fleet are in use",
            retry_after_s=figures.get("next_end_s"),
        )

    def lend(self, options: Mapping[str, Any], client: str) -> None:
        """Lends no slot, because this is called only if no host responds."""

    def keep(self, slot: str, token: str, client: str) -> NoReturn:
        """Raises SlotNotFound, because a host of the fleet has the slot."""
        raise SlotNotFound("no host of the fleet responds for this slot", slot=slot)

    def give_back(self, slot: str, token: str, client: str) -> NoReturn:
        """Raises SlotNotFound, because a host of the fleet has the slot."""
        self.keep(slot, token, client)

    def origin(self, slot: str, host: str, scheme: str) -> str:
        """Part of SlotBackend; not used, because no slot is handed out."""
        return f"{scheme}://{host}"

    def has_origins(self) -> bool:
        """Part of SlotBackend; not used, because no slot is handed out."""
        return False

    def can_prerender(self, host: str, scheme: str) -> bool:
        """True, because the host that lends a slot decides."""
        return True

    def knows(self, label: str) -> bool:
        """Whether the fleet has a host with this label."""
        try:
            return any(host.label == label for host in self.list_hosts())
        except GatewayDown:
            return False


def total(hosts: Mapping[str, Figures]) -> Figures:
    """The figures of the fleet: sums of the hosts' figures, and the minimum of times and of a slot's memory."""
    up = [host for host in hosts.values() if not host.get("down")]
    figures: Figures = {name: sum(_number(host, name) or 0 for host in up) for name in _SUMS}
    figures |= {"version": __version__, "hosts": dict(hosts), "ready": any(host.get("ready") for host in up)}
    figures["draining"] = bool(up) and all(host.get("draining") is True for host in up)
    figures["free_percent"] = round(100 * figures["available"] / figures["capacity"]) if figures["capacity"] else 0
    for name in ("next_end_s", "uptime_s", "idle_s", "life_s", "memory_bytes"):
        values = [value for host in up if (value := _number(host, name)) is not None]
        if values or name == "next_end_s":
            figures[name] = min(values, default=None)
    figures["internet"] = bool(up) and all(host.get("internet") is True for host in up)
    images = {host.get("container_image") for host in up}
    if len(images) == 1:
        figures["container_image"] = images.pop()
    # During a roll-out hosts have different images.
    assets = Counter(address for host in up if isinstance(address := host.get("assets"), str))
    figures["assets"] = assets.most_common(1)[0][0] if assets else None
    figures["claim_ms"] = {"p50": _median_of_medians(up), "p99": max(_times(up, "p99"), default=None)}
    return figures


def fetch_figures(host: HaproxyServer) -> Figures | None:
    """The public figures of a host, or None if it does not send them within DEADLINE_S."""
    connection = http.client.HTTPConnection(host.address, host.port, timeout=DEADLINE_S)
    try:
        connection.request("GET", "/api/stats", headers={"Accept": "application/json", "Host": host.label})
        response = connection.getresponse()
        if response.status != 200:
            return None
        document = json.loads(response.read(_RESPONSE_MAX_BYTES))
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return document if isinstance(document, dict) and _number(document, "capacity") is not None else None


def _number(figures: Figures, name: str) -> float | None:
    value = figures.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _times(up: Sequence[Figures], name: str) -> list[float]:
    all_times = (host.get("claim_ms") for host in up)
    return [value for times in all_times if isinstance(times, dict) and (value := _number(times, name)) is not None]


def _median_of_medians(up: Sequence[Figures]) -> float | None:
    """An estimate of the median over all claims of the fleet, from the medians of the hosts."""
    times = sorted(_times(up, "p50"))
    return times[len(times) // 2] if times else None
