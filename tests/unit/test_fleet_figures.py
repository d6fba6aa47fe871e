# SPDX-License-Identifier: BSD-3-Clause
"""Figures of a fleet: a stand-in agent keeps books as a host does, and statistics and tables of samples are right."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
NAMES = ("agents", "balance", "claimed", "figures", "fleetreport")


@pytest.fixture(autouse=True)
def bench_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs is a path of its own, and their names are common ones."""
    monkeypatch.syspath_prepend(str(BENCH))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)


def books_of(*capacities: int) -> Any:
    import agents

    made = [agents.Agent(agents.label(number), capacity) for number, capacity in enumerate(capacities)]
    return agents.Books(made, random.Random(1))


class Wire:
    """The transport of a protocol, at an agent's address."""

    def __init__(self, address: str) -> None:
        self.address, self.sent, self.closed = address, b"", False

    def get_extra_info(self, name: str) -> tuple[str, int]:
        assert name == "sockname"
        return self.address, 8000

    def write(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None:
        self.closed = True


def router(books: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Wire]:
    import agents

    monkeypatch.setattr("asyncio.Transport", Wire)
    made, wire = agents.Router(books), Wire(address)
    made.connection_made(wire)
    return made, wire


def test_an_agent_gives_what_it_has_and_the_same_slot_for_the_same_key() -> None:
    books = books_of(2)
    first = books.claim(0, "x")
    assert first and first.startswith("h0-")
    assert books.claim(0, "x") == first and books.agents[0].used == 1
    assert books.claim(0, "y") not in (None, first)
    assert books.claim(0, "z") is None
    assert (books.agents[0].given, books.agents[0].refused) == (2, 1)


def test_free_capacity_is_0_percent_only_when_nothing_is_free() -> None:
    books = books_of(300)
    books.agents[0].used = 299
    assert books.agents[0].percent() == 1
    books.agents[0].used = 300
    assert books.agents[0].percent() == 0
    books.agents[0].used = 0
    assert books.agents[0].percent() == 100


def test_a_fleet_that_is_held_loses_a_slot_with_each_claim() -> None:
    books = books_of(*[10] * 20)
    books.set(0.9, hold=True)
    assert sum(agent.used for agent in books.agents) == 180
    given = sum(books.claim(number % 20, f"{number}") is not None for number in range(400))
    assert given > 100
    assert sum(agent.used for agent in books.agents) == 180 == len(books.seats)
    assert all(0 <= agent.used <= 10 for agent in books.agents)
    books.set(0.5, even=True)
    assert [agent.used for agent in books.agents] == [5] * 20 and books.hold is None


def test_addresses_are_told_apart() -> None:
    import agents

    every = [agents.address(number) for number in range(1000)]
    assert len(set(every)) == 1000
    assert [agents.number_of(one) for one in every] == list(range(1000))
    assert list(agents.capacities("5,2x3")) == [5, 2, 2, 2]


def test_a_router_hears_whose_address_it_is_and_requests_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    import agents

    books = books_of(1, 1, 1)
    made, wire = router(books, agents.address(2), monkeypatch)
    request = b"POST /api/spawn HTTP/1.1\r\nHost: x\r\nIdempotency-Key: k\r\nContent-Length: 4\r\n\r\nbody"
    for place in range(len(request)):
        made.data_received(request[place : place + 1])
    head, _, body = wire.sent.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and json.loads(body)["url"].startswith("/user/h2-")
    assert [agent.used for agent in books.agents] == [0, 0, 1] and not wire.closed
    wire.sent = b""
    made.data_received(request.replace(b"Key: k", b"Key: l") + b"GET /healthz HTTP/1.0\r\n\r\n")
    assert wire.sent.startswith(b"HTTP/1.1 503 ") and b"HTTP/1.1 200 OK" in wire.sent and wire.closed


def test_the_gini_index_and_the_peak_are_those_of_shares() -> None:
    import balance

    assert balance.gini([3, 3, 3, 3]) == pytest.approx(0)
    assert balance.gini([0, 0, 0, 1]) == pytest.approx(0.75)
    assert balance.gini([0, 0]) == 0
    said = balance.spread([50, 100, 50], [100, 200, 400])
    assert (said.most, said.mean) == (0.5, pytest.approx(1.125 / 3))
    assert said.peak == pytest.approx(1.5 / 1.125)


def test_perfect_knowledge_fails_no_claim_while_there_is_room_and_keeps_hosts_alike() -> None:
    import balance

    books = books_of(*[10] * 30)
    books.set(0.99, hold=True, even=False)
    played = balance.play(books, 2000, balance.emptiest, tries=1)
    assert (played.failed, played.refusals) == (0, 0)
    full = books_of(1, 1)
    assert balance.play(full, 3, balance.emptiest, tries=2) == balance.Played(3, 1, 2, 1.0, balance.of(full.agents))


def test_draws_by_free_capacity_lead_to_places_in_use_at_random() -> None:
    """Ehrenfest's urns: where the simulation of a thousand hosts begins is where such draws end, however it began."""
    import balance

    books = books_of(*[100] * 200)
    books.set(0.5, hold=True, even=True)
    for _ in range(5):
        found = balance.play(books, 20000, balance.Drawn(100), tries=11).spread
        books.keys.clear()
    # The deviation of a binomial distribution of a hundred halves.
    assert found.deviation == pytest.approx(0.05, rel=0.2)


def test_old_weights_are_refused_more_often() -> None:
    import balance

    refusals = []
    for every in (1, 500):
        books = books_of(*[20] * 100)
        books.set(0.99, hold=True)
        refusals.append(balance.play(books, 1000, balance.Drawn(every), tries=11).refusals)
    assert refusals[0] == 0 < refusals[1]


def test_the_summary_counts_every_status_but_200_as_failed() -> None:
    import claimed

    made = [claimed.Claimed(200, "a-1", 0, 5), claimed.Claimed(200, "b-1", 0, 7), claimed.Claimed(0, "", 0, 100)]
    summary = claimed.summary([*made, claimed.Claimed(503, "", 0, 2)])
    assert (summary["claims"], summary["failed"], summary["by_host"]) == (4, 2, {"a": 1, "b": 1})
    assert summary["statuses"] == {"0": 1, "200": 2, "503": 1}
    assert claimed.slot_of("http://x/user/a-1/lab?token=t") == "a-1"


def test_haproxys_own_figures_are_read() -> None:
    import claimed

    text = '# HELP x y\nhaproxy_backend_retry_warnings_total{proxy="claims"} 7\n'
    name = "haproxy_backend_retry_warnings_total"
    assert claimed.metric(text, name, 'proxy="claims"') == 7
    assert claimed.metric(text, name, 'proxy="users"') == 0
    assert claimed.rows("# pxname,svname,wretr\nclaims,BACKEND,3\n") == [
        {"pxname": "claims", "svname": "BACKEND", "wretr": "3"}]


def test_every_part_has_a_table_and_says_how_it_is_measured() -> None:
    import fleetreport

    assert set(fleetreport.HOW) == set(fleetreport.TABLES)
    part = {"hosts": 4, "claims": 1000, "failed": 0, "retries": 3, "by_host": {"h0": 600, "h1": 400},
            "answer_ms": {"p50": 6.5, "p99": 17.0, "max": 20.0}, "load": [1.5, 2.25]}
    text, marked = fleetreport.report({"killed-agents": part, "about": "a machine"})
    assert "SIGKILL. Load of the machine: 1.5 before, 2.2 after." in text
    assert "|  | 1,000 | 0 | 3 | 6.5 | 17 | 20 | h0 600 h1 400 |" in marked.splitlines()
    assert text.endswith("a machine\n")
