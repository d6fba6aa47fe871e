# SPDX-License-Identifier: BSD-3-Clause
"""Measurements with stand-in agents behind the real HAProxy. Run in a thread in a network namespace of its own."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
import urllib.request
from dataclasses import asdict
from typing import Any

import agents
import aiohttp
import balance
import figures
import load
from claimed import summary
from gateway import HERE, URL, Gateway, Processes

from nbagent.gateway.settings import FleetSettings
from product import say

UNEQUAL = (100, 200, 400)
LEVELS = (0.5, 0.9, 0.99)
PLACES = 100
ANSWER_MS = 5.0


def call(body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The agents' books, after they were set."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(f"http://{agents.address(0)}:{agents.ROUTER_PORT}/bench", data, timeout=30) as answer:
        document: dict[str, Any] = json.load(answer)
    return document


def unequal(processes: Processes) -> dict[str, Any]:
    """Hosts of 1:2:4, filled from nothing: the share of each one's places in use at each level."""
    capacity = ",".join(map(str, UNEQUAL))
    processes.agents(capacity, "--status", processes.status_socket)
    processes.haproxy(len(UNEQUAL))
    call({"level": 0})
    steps, failed, whole = [], 0, sum(UNEQUAL)
    for level in (0.25, 0.5, 0.75, 0.9):
        claims = asyncio.run(load.at_rate(URL, round(level * whole) - sum(call()["used"]), 50))
        failed += summary(claims)["failed"]
        books = call()
        shares = [used / most for used, most in zip(books["used"], UNEQUAL, strict=True)]
        steps.append({
            "level": level, "used": books["used"], "share_used": shares, "refusals": sum(books["refused"]),
            "spread": asdict(balance.spread(books["used"], UNEQUAL)),
        })
    return {"capacity": UNEQUAL, "claims_a_second": 50, "failed": failed, "steps": steps}


def killed(processes: Processes, claims: int) -> dict[str, Any]:
    """One of four hosts is killed while claims come, sixteen at a time."""
    hosts = 4
    made = [
        processes.agents(f"{claims}", "--only", f"{number}", "--answer-ms", f"{ANSWER_MS}", "--seed", f"{number}")
        for number in range(hosts)
    ]
    # A listener on the wildcard address would also accept connections to the killed agent's address.
    processes.agents("1", "--only", f"{hosts}", "--status", processes.status_socket)
    gateway = processes.haproxy(hosts)
    found = summary(asyncio.run(load.at_a_time(URL, claims, 16, halfway=made[-1].kill)))
    return found | {"hosts": hosts, "retries": gateway.retries(), "answer_takes_ms": ANSWER_MS}


def thousand(processes: Processes, hosts: int, claims: int, a_second: float) -> dict[str, Any]:
    """Many agents, so full and so kept: HAProxy as it is, and other knowledge played."""
    levels = []
    processes.agents(f"{PLACES}x{hosts}", "--status", processes.status_socket)
    gateway = processes.haproxy(hosts)
    checks = rest(gateway)
    for level in LEVELS:
        say(f"{hosts} agents, {level:.0%} full: {claims} claims")
        call({"level": level, "hold": True})
        # Time for a further agent-check of every agent.
        time.sleep(3)
        before, cpu_s, begun_s = gateway.retries(), gateway.cpu_s(), time.monotonic()
        found = summary(asyncio.run(load.at_rate(URL, claims, a_second)))
        took_s = time.monotonic() - begun_s
        books = call()
        del found["by_host"]
        levels.append({
            "level": level, "haproxy": found | {
                "retries": gateway.retries() - before, "refusals": sum(books["refused"]),
                "went_free": books["free_sum"] / max(1, sum(books["given"])),
                "spread": asdict(balance.spread(books["used"], books["capacity"])), "used": books["used"],
                "cpu_percent": 100 * (gateway.cpu_s() - cpu_s) / took_s, "a_second": claims / took_s,
            },
            "played": played(hosts, level, claims, a_second),
        })
    memory = gateway.memory_kib()
    return {
        "hosts": hosts, "places": PLACES, "claims": claims, "a_second": a_second, "checks": checks, "levels": levels,
        "haproxy_rss_mib": memory["VmRSS"] / 1024,
    }


def rest(gateway: Gateway, for_s: float = 10) -> dict[str, float]:
    """The processor time of HAProxy for checks alone, and their number."""
    call({"level": 0.5, "hold": True})
    before, cpu_s, begun_s = call(), gateway.cpu_s(), time.monotonic()
    time.sleep(for_s)
    after, cpu_after_s, took_s = call(), gateway.cpu_s(), time.monotonic() - begun_s
    return {
        "agent_checks_a_second": (after["checks"] - before["checks"]) / took_s,
        "health_checks_a_second": (after["probes"] - before["probes"]) / took_s,
        "haproxy_cpu_percent": 100 * (cpu_after_s - cpu_s) / took_s,
        "agents_cpu_percent": 100 * (after["cpu_s"] - before["cpu_s"]) / took_s,
    }


def played(hosts: int, level: float, claims: int, a_second: float) -> dict[str, Any]:
    """The same claims without HAProxy: by perfect knowledge, and by weights of no age and of a second."""
    ways: dict[str, balance.Choose] = {
        "perfect": balance.emptiest, "fresh": balance.Drawn(1), "second": balance.Drawn(round(a_second)),
        "two": balance.emptier_of_two,
    }
    made = {}
    for name, choose in ways.items():
        made_of = [agents.Agent(agents.label(number), PLACES) for number in range(hosts)]
        books = agents.Books(made_of, random.Random(7))
        books.set(level, hold=True, even=name == "perfect")
        made[name] = asdict(balance.play(books, claims, choose, tries=FleetSettings().retries + 1))
    return made


def websockets(processes: Processes, count: int) -> dict[str, Any]:
    """So many open at once to one stand-in host; each is answered when all are open, and once more."""
    echo = [sys.executable, str(HERE / "echo.py"), agents.address(0)]
    server = processes.start(echo, stdout=-1, text=True)
    assert server.stdout is not None
    server.stdout.readline()
    processes.agents("1", "--only", "1", "--status", processes.status_socket)
    gateway = processes.haproxy(1)
    return asyncio.run(_websockets(gateway, count))


async def _websockets(gateway: Gateway, count: int) -> dict[str, Any]:
    before, errors, took_ms = gateway.memory_kib()["VmRSS"], [], []
    turn = asyncio.Semaphore(50)
    sockets: list[aiohttp.ClientWebSocketResponse] = []

    async def open_one(http: aiohttp.ClientSession, number: int) -> None:
        async with turn:
            try:
                url = f"{URL}/user/{agents.label(0)}-{number:012x}/channels"
                sockets.append(await http.ws_connect(url, autoping=True))
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                errors.append(f"open: {type(error).__name__}: {error}"[:200])

    async def ask(socket: aiohttp.ClientWebSocketResponse, text: str) -> None:
        async with turn:
            began_s = time.perf_counter()
            try:
                await socket.send_str(text)
                answer = await socket.receive_str(timeout=60)
                if answer != text:
                    errors.append(f"asked {text}, answered {answer}")
            except (aiohttp.ClientError, OSError, TimeoutError, TypeError) as error:
                errors.append(f"ask: {type(error).__name__}: {error}"[:200])
            took_ms.append(1000 * (time.perf_counter() - began_s))

    async with load.session() as http:
        began_s = time.perf_counter()
        await asyncio.gather(*(open_one(http, number) for number in range(count)))
        opened_s = time.perf_counter() - began_s
        opened = gateway.memory_kib()["VmRSS"]
        for round_ in range(2):
            await asyncio.gather(*(ask(socket, f"{round_}-{place}") for place, socket in enumerate(sockets)))
        after = gateway.memory_kib()
        still = sum(not socket.closed for socket in sockets)
        await asyncio.gather(*(socket.close() for socket in sockets))
    return {
        "wanted": count, "opened": len(sockets), "open_at_the_end": still, "errors": errors[:10],
        "error_count": len(errors), "opening_s": opened_s, "answer_ms": figures.latency(took_ms),
        "kib_each": (after["VmRSS"] - before) / max(1, count), "kib_each_opened": (opened - before) / max(1, count),
        "rss_before_mib": before / 1024, "rss_after_mib": after["VmRSS"] / 1024, "load": os.getloadavg()[0],
    }
