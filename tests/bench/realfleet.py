# SPDX-License-Identifier: BSD-3-Clause
"""Measurements on a fleet of real hosts: nbagent and the gateway, installed by their packages."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import figures
import load
from claimed import Claimed, metric, slot_of, summary

from fleet import HTTP_PORT, Fleet, gateway_address, host_address
from product import API_PORT, ROUTER_PORT, Api, say, wait_warm
from testhost_driver import netns

LABELS = ("a", "b", "c")
WARM = 12
# All requests come from one address, which releases its slots by the control API.
SETTINGS = f"""\
[slots]
capacity = 300
[pool]
warm = {WARM}
claim_timeout = "60s"
[landing]
rate = 100000
[api]
trusted_networks = ["127.0.0.0/8", "10.77.0.0/24"]
"""
GATEWAY_SETTINGS = "[landing]\nrate = 100000\n"
METRICS_PORT = 8405
TIMEOUT_S = 60
CLIENTS = 8


class RealFleet:
    """Three hosts and a gateway of this run. Clients run by `inside`, in the network of the hosts."""

    def __init__(self) -> None:
        self.fleet = Fleet(f"fb{os.getpid()}", LABELS)
        self.gateway_url = f"http://{gateway_address(0)}:{HTTP_PORT}"
        self.addresses = {label: host_address(number) for number, label in enumerate(LABELS)}

    def __enter__(self) -> RealFleet:
        try:
            self.fleet.up(say, SETTINGS, GATEWAY_SETTINGS)
            self._wait_gateway()
        except BaseException:
            self.fleet.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.fleet.down()

    def _wait_gateway(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while sum(self.metric("server_status", f'proxy="claims",server="{one}",state="UP"') for one in LABELS) < 3:
            if time.monotonic() > deadline:
                raise SystemExit("the gateway does not see all hosts")
            time.sleep(0.5)

    def metric(self, name: str, labels: str) -> float:
        """A figure of HAProxy's own."""
        text = Api(self.fleet.gateways[0], METRICS_PORT).get("/metrics").body.decode()
        return metric(text, f"haproxy_{name}", labels)

    def inside(self, action: Callable[[], Any]) -> Any:
        """Runs `action` in a thread in the fleet's network, with the bridge's address."""
        return netns_call(self.fleet.lan.name, action)

    def warm(self) -> None:
        """Waits until all pools are full again."""
        for host in self.fleet.hosts.values():
            wait_warm(host, WARM)

    def release(self, slot: str) -> None:
        """Ends a slot, in the network."""
        connection = http.client.HTTPConnection(self.addresses[slot.partition("-")[0]], API_PORT, timeout=TIMEOUT_S)
        connection.request("DELETE", f"/slots/{slot}")
        connection.getresponse().read()
        connection.close()

    # -- latency of the gateway ----------------------------------------------------------------

    def latency(self, requests: int, claims: int) -> dict[str, Any]:
        """GET of a slot's api and POST /api/spawn, direct and through the gateway, by turns."""
        self.warm()
        return dict(self.inside(lambda: self._latency(requests, claims)))

    def _latency(self, requests: int, claims: int) -> dict[str, Any]:
        through = http.client.HTTPConnection(gateway_address(0), HTTP_PORT, timeout=TIMEOUT_S)
        slot = slot_of(spawn(through)[0])
        host, path = self.addresses[slot.partition("-")[0]], f"/user/{slot}/api"
        straight = http.client.HTTPConnection(host, ROUTER_PORT, timeout=TIMEOUT_S)
        kept: dict[str, list[float]] = {"straight": [], "through": []}
        for number in range(requests + 20):
            for name, connection in (("straight", straight), ("through", through)):
                took_ms = get_ms(connection, path)
                if number >= 20:
                    kept[name].append(took_ms)
        new: dict[str, list[float]] = {"straight": [], "through": []}
        for _ in range(requests // 2):
            for name, where, port in (("straight", host, ROUTER_PORT), ("through", gateway_address(0), HTTP_PORT)):
                connection = http.client.HTTPConnection(where, port, timeout=TIMEOUT_S)
                new[name].append(get_ms(connection, path))
                connection.close()
        self.release(slot)
        asked: dict[str, list[float]] = {"straight": [], "through": []}
        # The gateway distributes over all hosts, and a host with few requests is slower.
        hosts = [http.client.HTTPConnection(one, ROUTER_PORT, timeout=TIMEOUT_S) for one in self.addresses.values()]
        for number in range(claims):
            for name, connection in (("straight", hosts[number % len(hosts)]), ("through", through)):
                url, took_ms = spawn(connection)
                asked[name].append(took_ms)
                self.release(slot_of(url))
                # The pool is full again, and nothing starts while the next claim is timed.
                time.sleep(0.15)
        for connection in (straight, through, *hosts):
            connection.close()
        return {
            name: {way: figures.latency(samples) for way, samples in ways.items()}
            for name, ways in (("kept connection", kept), ("new connection", new), ("claim", asked))
        }

    # -- claims a second -----------------------------------------------------------------------

    def rate(self, seconds: float, rounds: int) -> dict[str, Any]:
        """Eight clients that claim and release as fast as they can: one host directly, and the fleet, by turns."""
        urls = {"one host, straight": f"http://{self.addresses['a']}:{ROUTER_PORT}",
                "one fleet, through the gateway": self.gateway_url}
        made: dict[str, list[Claimed]] = {name: [] for name in urls}
        for _ in range(rounds):
            for name, url in urls.items():
                self.warm()
                made[name] += self.inside(lambda url=url: asyncio.run(load.at_a_time(
                    url, 1 << 30, CLIENTS, then=self._release, seconds=seconds)))
        return {name: summary(claims) | {"a_second": len(claims) / seconds / rounds} for name, claims in made.items()}

    async def _release(self, session: aiohttp.ClientSession, claimed: Claimed) -> None:
        url = f"http://{self.addresses[claimed.label]}:{API_PORT}/slots/{claimed.slot}"
        async with session.delete(url) as answer:
            await answer.read()

    # -- a host dies ---------------------------------------------------------------------------

    def killed(self, claims: int) -> dict[str, Any]:
        """Ends the last host, with all its processes and its network, when a third is claimed; it does not return."""
        self.warm()
        now = threading.Event()
        victim = self.fleet.hosts[LABELS[-1]]

        def kill() -> None:
            if now.wait(TIMEOUT_S):
                victim.down(now=True)

        killer = threading.Thread(target=kill)
        killer.start()
        before = self.metric("backend_retry_warnings_total", 'proxy="claims"')
        made: list[Claimed] = self.inside(
            lambda: asyncio.run(load.at_a_time(self.gateway_url, claims, CLIENTS, halfway=now.set))
        )
        killer.join()
        retries = self.metric("backend_retry_warnings_total", 'proxy="claims"') - before
        return summary(made) | {"hosts": len(LABELS), "retries": round(retries)}


def netns_call(name: str, action: Callable[[], Any]) -> Any:
    """Runs `action` in a thread in the network namespace `name`, which its child processes inherit."""
    done: list[Any] = []

    def work() -> None:
        try:
            netns.enter(netns.path_of(name))
            done.append((action(), None))
        except BaseException as error:
            done.append((None, error))

    thread = threading.Thread(target=work, name=f"in-{name}", daemon=True)
    thread.start()
    thread.join()
    result, error = done[0]
    if error is not None:
        raise error
    return result


def get_ms(connection: http.client.HTTPConnection, path: str) -> float:
    """Milliseconds of a GET until its whole body is read. Raises RuntimeError when the status is not 200."""
    began_s = time.perf_counter()
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    took_ms = 1000 * (time.perf_counter() - began_s)
    if answer.status != 200:
        raise RuntimeError(f"GET {path}: {answer.status}")
    return took_ms


def spawn(connection: http.client.HTTPConnection) -> tuple[str, float]:
    """The url of a claim by tmpnb's API, and its milliseconds."""
    began_s = time.perf_counter()
    connection.request("POST", "/api/spawn")
    answer = connection.getresponse()
    text = answer.read()
    took_ms = 1000 * (time.perf_counter() - began_s)
    if answer.status != 200:
        raise RuntimeError(f"POST /api/spawn: {answer.status} {text[:300]!r}")
    return str(json.loads(text)["url"]), took_ms
