"""The fleet as the landing page's SlotBackend: figures that the hosts tell when they are asked, and their sums.

Nothing is kept but for a second. Which hosts there are, HAProxy says, so this and what claims and
users meet are never of two opinions. It hands out nothing: HAProxy sends a claim here when no host
takes it.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from nbagent import __version__
from nbagent.core.errors import Full
from nbagent.gateway.runtime import GatewayDown, HaproxyServer

# Anybody may ask as often as they like; the hosts are asked so often.
FIGURES_AGE_S = 1.0
DEADLINE_S = 1.5
# Waiting costs a thread and no processor.
THREADS = 64
_ANSWER_MAX_BYTES = 1 << 20
_SUMS = ("available", "capacity", "in_use", "warm", "starting", "claims")

Figures = dict[str, Any]
DOWN: Figures = {"available": 0, "capacity": 0, "down": True}


class FleetBackend:
    """All hosts of `list_hosts`, which raises GatewayDown; each is asked by `ask_host`, which gives None in vain."""

    def __init__(
        self,
        list_hosts: Callable[[], Sequence[HaproxyServer]],
        ask_host: Callable[[HaproxyServer], Figures | None] | None = None,
    ) -> None:
        self.list_hosts = list_hosts
        self.ask_host = ask_host or ask
        self._lock = threading.Lock()
        self._figures: Figures = {}
        self._asked_s = -FIGURES_AGE_S
        self._threads: ThreadPoolExecutor | None = None

    def stats(self) -> Figures:
        """The sums, and under `hosts` the figures of each host, at most a second old."""
        with self._lock:
            if time.monotonic() >= self._asked_s + FIGURES_AGE_S:
                self._figures = total(self._ask_all())
                self._asked_s = time.monotonic()
            return self._figures

    def _ask_all(self) -> dict[str, Figures]:
        # Made here and not in the arbiter: threads do not go through its fork.
        self._threads = self._threads or ThreadPoolExecutor(THREADS)
        hosts = self.list_hosts()
        answers = self._threads.map(lambda host: None if host.is_down else self.ask_host(host), hosts)
        # By label: where a host has its address is nobody's business out there.
        return {f"http://{host.label}": answer or DOWN for host, answer in zip(hosts, answers, strict=True)}

    def claim(self, options: Mapping[str, Any], key: str | None, client: str) -> NoReturn:
        """Refuses, as every host has."""
        figures = self.stats()
        raise Full(
            f"{figures['in_use']} of {figures['capacity']} slots of the fleet are in use",
            retry_after_s=figures.get("next_end_s"),
        )

    def origin(self, slot: str, host: str, scheme: str) -> str:
        """Of no use where no slot is handed out."""
        return f"{scheme}://{host}"

    def has_origins(self) -> bool:
        """Of no use either."""
        return False

    def knows(self, label: str) -> bool:
        """Whether there is a host of this label."""
        try:
            return any(host.label == label for host in self.list_hosts())
        except GatewayDown:
            return False


def total(hosts: Mapping[str, Figures]) -> Figures:
    """The fleet's figures of the hosts'. How long a slot lives, and its memory, is the least that one gives."""
    up = [figures for figures in hosts.values() if not figures.get("down")]
    answer: Figures = {name: sum(_number(figures, name) or 0 for figures in up) for name in _SUMS}
    answer |= {"version": __version__, "hosts": dict(hosts), "ready": any(figures.get("ready") for figures in up)}
    answer["draining"] = bool(up) and all(figures.get("draining") is True for figures in up)
    answer["free_percent"] = round(100 * answer["available"] / answer["capacity"]) if answer["capacity"] else 0
    for name in ("next_end_s", "uptime_s", "idle_s", "life_s", "memory_bytes"):
        told = [value for figures in up if (value := _number(figures, name)) is not None]
        if told or name == "next_end_s":
            answer[name] = min(told, default=None)
    answer["internet"] = bool(up) and all(figures.get("internet") is True for figures in up)
    images = {figures.get("container_image") for figures in up}
    if len(images) == 1:
        answer["container_image"] = images.pop()
    answer["claim_ms"] = {"p50": _middle(up), "p99": max(_times(up, "p99"), default=None)}
    return answer


def ask(host: HaproxyServer) -> Figures | None:
    """The public figures of one host, None when it does not tell them in time."""
    connection = http.client.HTTPConnection(host.address, host.port, timeout=DEADLINE_S)
    try:
        connection.request("GET", "/api/stats", headers={"Accept": "application/json", "Host": host.label})
        answer = connection.getresponse()
        if answer.status != 200:
            return None
        document = json.loads(answer.read(_ANSWER_MAX_BYTES))
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return document if isinstance(document, dict) and _number(document, "capacity") is not None else None


def _number(figures: Figures, name: str) -> float | None:
    value = figures.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _times(up: Sequence[Figures], name: str) -> list[float]:
    told = (figures.get("claim_ms") for figures in up)
    return [value for times in told if isinstance(times, dict) and (value := _number(times, name)) is not None]


def _middle(up: Sequence[Figures]) -> float | None:
    """Of all claims of the fleet, near enough: the middle of the hosts' middles."""
    times = sorted(_times(up, "p50"))
    return times[len(times) // 2] if times else None
