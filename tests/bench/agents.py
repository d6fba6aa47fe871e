#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""Stand-ins for the hosts of a fleet: the interfaces that a gateway uses of an agent, without slots.

    tests/bench/agents.py --capacity N[,N…] [--answer-ms N] [--status SOCKET]

Agent n has the address `address(n)`, with a router on port 8000, which serves `POST /api/spawn`, /spawn, /healthz and
the gateway's check, and the agent-check on port 9001. One process serves any number of agents by two sockets that are
bound to all addresses, so it runs in a network namespace where no other program listens. With one --capacity and
--only NUMBER it serves that agent alone, at its own address, so that a kill of the process is the death of one host.
--status is a unix socket with the response of the gateway's status service when no host has a free slot: 429.

The benchmark controls it at /bench: GET returns the books, POST with a JSON object sets them (`Books.set`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

ROUTER_PORT, CHECK_PORT = 8000, 9001
_PER_NET = 250
_REASONS = {200: "OK", 404: "Not Found", 429: "Too Many Requests", 503: "Service Unavailable"}


def address(number: int) -> str:
    """The loopback address of an agent."""
    return f"127.1.{number // _PER_NET}.{number % _PER_NET + 1}"


def label(number: int) -> str:
    return f"h{number}"


class Agent:
    """The books of one host: its slots in use, by the key of their claim."""

    def __init__(self, name: str, capacity: int) -> None:
        self.name, self.capacity = name, capacity
        self.used = self.given = self.refused = 0

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def percent(self) -> int:
        """Free capacity in percent, as in the agent-check: 0 only when a claim would be refused."""
        return math.ceil(100 * self.free / self.capacity)


class Books:
    """All agents of the process. Slots end at random, so that `hold` slots stay in use."""

    def __init__(self, agents: list[Agent], chance: random.Random) -> None:
        self.agents, self.chance = agents, chance
        self.hold: int | None = None
        # One element for each slot in use: the number of its agent.
        self.seats: list[int] = []
        self.keys: dict[tuple[int, str], str] = {}
        self.checks = self.probes = 0
        # For each successful claim: the free share of its host.
        self.free_sum = 0.0

    def claim(self, number: int, key: str) -> str | None:
        """Claims a slot; the same key gets the same slot. None when the agent is full."""
        if slot := self.keys.get((number, key)):
            return slot
        agent = self.agents[number]
        if agent.free <= 0:
            agent.refused += 1
            return None
        self.free_sum += agent.free / agent.capacity
        agent.used += 1
        agent.given += 1
        self.seats.append(number)
        slot = self.keys[number, key] = f"{agent.name}-{self.chance.getrandbits(60):015x}"
        self._settle()
        return slot

    def _settle(self) -> None:
        """Ends slots, drawn uniformly at random, until at most `hold` are in use."""
        while self.hold is not None and len(self.seats) > self.hold:
            place = self.chance.randrange(len(self.seats))
            self.seats[place], self.seats[-1] = self.seats[-1], self.seats[place]
            self.agents[self.seats.pop()].used -= 1

    def set(self, level: float, hold: bool = False, even: bool = False) -> None:
        """Starts again with the share `level` of the capacity in use, drawn at random or evenly over the agents."""
        for agent in self.agents:
            agent.used = agent.given = agent.refused = 0
        self.keys.clear()
        self.checks = self.probes = 0
        self.free_sum = 0.0
        if even:
            shares = [round(level * agent.capacity) for agent in self.agents]
            self.seats = [number for number, share in enumerate(shares) for _ in range(share)]
        else:
            places = [number for number, agent in enumerate(self.agents) for _ in range(agent.capacity)]
            self.seats = self.chance.sample(places, round(level * len(places)))
        for number in self.seats:
            self.agents[number].used += 1
        self.hold = len(self.seats) if hold else None

    def document(self) -> dict[str, Any]:
        """The books as the benchmark reads them."""
        columns = ("capacity", "used", "given", "refused")
        return {name: [getattr(agent, name) for agent in self.agents] for name in columns} | {
            "free_sum": self.free_sum, "checks": self.checks, "probes": self.probes, "cpu_s": sum(os.times()[:2]),
        }


class Router(asyncio.Protocol):
    """An agent's router, or with `full` the status service, with the subset of HTTP that HAProxy and aiohttp use."""

    def __init__(self, books: Books, answer_s: float = 0, full: bool = False, only: int | None = None) -> None:
        self.books, self.answer_s, self.full, self.only = books, answer_s, full, only
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while b"\r\n\r\n" in self.received:
            head, _, rest = self.received.partition(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            size = int(headers.get("content-length", 0))
            if len(rest) < size:
                return
            body, self.received = rest[:size], rest[size:]
            method, path, version = first.split(" ")
            closes = headers.get("connection", "").lower() == "close" or version == "HTTP/1.0"
            status, document = self.answer(method, path.partition("?")[0], headers, body)
            if self.answer_s and path.startswith("/api/spawn"):
                asyncio.get_running_loop().call_later(self.answer_s, self.send, status, document, closes)
            else:
                self.send(status, document, closes)

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, Any]:
        if path == "/healthz" or path.endswith("/nbagent/return"):
            self.books.probes += 1
            return 200, "ok"
        if self.full:
            return 429, {"status": "full"}
        if path == "/bench":
            if method == "POST":
                self.books.set(**json.loads(body))
            return 200, self.books.document()
        if path.startswith(("/api/spawn", "/spawn")):
            number = self.number() if self.only is None else 0
            slot = self.books.claim(number, headers.get("idempotency-key", ""))
            return (200, {"url": f"/user/{slot}/"}) if slot else (503, {"status": "full"})
        return 404, {}

    def number(self) -> int:
        """The number of the agent that the request was sent to."""
        return number_of(self.transport.get_extra_info("sockname")[0])

    def send(self, status: int, document: Any, closes: bool) -> None:
        body = json.dumps(document).encode()
        more = "Connection: close\r\n" if closes else ""
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\n{more}Content-Type: application/json\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if closes:
            self.transport.close()


class Check(asyncio.Protocol):
    """The agent-check."""

    def __init__(self, books: Books, only: int | None = None) -> None:
        self.books, self.only = books, only

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.books.checks += 1
        number = number_of(transport.get_extra_info("sockname")[0]) if self.only is None else 0
        transport.write(b"ready %d%%\n" % self.books.agents[number].percent())
        transport.close()


def number_of(of_address: str) -> int:
    """The number of the agent with this address; 0 for an address of no agent, such as the benchmark's own."""
    _, net, high, low = map(int, of_address.split("."))
    return high * _PER_NET + low - 1 if net == 1 else 0


def capacities(text: str) -> Iterator[int]:
    """The capacity of each agent: 100x1000 is a thousand agents of 100."""
    for part in text.split(","):
        capacity, _, count = part.partition("x")
        yield from [int(capacity)] * int(count or 1)


async def serve(arguments: argparse.Namespace) -> None:
    """Serves until killed. Prints a line on standard output when it listens."""
    first = arguments.only or 0
    agents = [Agent(label(first + place), capacity) for place, capacity in enumerate(capacities(arguments.capacity))]
    books, loop = Books(agents, random.Random(arguments.seed)), asyncio.get_running_loop()
    where, answer_s = "0.0.0.0" if arguments.only is None else address(first), arguments.answer_ms / 1000
    await loop.create_server(
        lambda: Router(books, answer_s, only=arguments.only), where, ROUTER_PORT, backlog=4096
    )
    await loop.create_server(lambda: Check(books, arguments.only), where, CHECK_PORT, backlog=4096)
    if arguments.status:
        await loop.create_unix_server(lambda: Router(books, full=True), arguments.status, backlog=4096)
    print("listening", flush=True)
    await loop.create_future()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--capacity", required=True, metavar="N,N…", help="of each agent; 100x1000: of a thousand")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one agent, with this number")
    parser.add_argument("--answer-ms", type=float, default=0, help="how long a claim takes")
    parser.add_argument("--status", metavar="SOCKET", help="unix socket on which to serve as the status service")
    parser.add_argument("--seed", type=int, default=1)
    try:
        asyncio.run(serve(parser.parse_args()))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
