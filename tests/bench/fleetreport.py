# SPDX-License-Identifier: BSD-3-Clause
"""The figures of a fleet for a reader: a table a part, and its method below it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import figures
from figures import number

Table = list[list[str]]

HOW = {
    "latency": (
        "Three real hosts and a gateway. One client, one request after another, each sent directly to the host's "
        "router and then through the gateway: GET /user/SLOT/api of one slot, and POST /api/spawn with a full pool "
        "(direct: to each host by turns; through: to the host that the gateway chose), released after each. `added` is "
        "the difference of the medians."
    ),
    "rate": (
        "The same fleet: 8 clients that POST /api/spawn, release the slot by the host's control API, and claim again "
        "when that is done, for some seconds; one host and the fleet by turns. Hosts, gateway and clients share the "
        "processors, so that this is no measure of three machines."
    ),
    "killed": (
        "The same fleet, 8 clients: when a third is claimed one of the three hosts is ended with all its processes and "
        "its network, and does not return. `failed` counts every response but 200."
    ),
    "killed-agents": (
        "Four stand-in agents (tests/bench/agents.py), a process each, which take 5 ms for a claim; 16 clients. When a "
        "third is claimed one gets SIGKILL."
    ),
    "unequal": (
        "Three stand-in agents of 100, 200 and 400 places, filled from nothing at 50 claims a second. In the table: "
        "the share of each host's own places that is in use, which an ideal gateway keeps alike."
    ),
    "thousand": (
        "Stand-in agents with 100 places each, in one process; each has an address of its own, and HAProxy checks each "
        "as it does a host. At first the places in use are drawn at random, which is where draws by free capacity lead "
        "in the end; with each claim one slot ends, drawn at random. `refusals` are answers 503 of agents, each a "
        "retry; `failed` are claims without a slot. Perfect: the same claims simulated without HAProxy, each to the "
        "emptiest host. Simulated: one host drawn with its free capacity as the weight, known now or a second ago; and "
        "two hosts drawn uniformly, of which the emptier one now is chosen. `went to, free`: the mean free share of "
        "the hosts that accepted a claim."
    ),
    "websockets": (
        "To one stand-in host (tests/bench/echo.py) through HAProxy: all are opened, 50 at a time; when all are open "
        "each echoes two messages. Memory is the growth of HAProxy's VmRSS, divided by their number."
    ),
}


def report(found: Mapping[str, Any]) -> tuple[str, str]:
    """As text, and as Markdown."""
    texts, marks = [], []
    for name, how in HOW.items():
        if name not in found:
            continue
        part = found[name]
        first, last = part["load"]
        below = f"{how} Load of the machine: {first:.1f} before, {last:.1f} after."
        table = TABLES[name](part)
        texts += [figures.columns_of(table), below]
        marks += [figures.markdown(table), below]
    return "\n\n".join([*texts, found["about"]]) + "\n", "\n\n".join([*marks, found["about"]]) + "\n"


def latency(part: Mapping[str, Any]) -> Table:
    table = [["ms", "n", "straight p50", "p99", "through p50", "p99", "added"]]
    for name, title in (
        ("kept connection", "GET api, kept connection"), ("new connection", "GET api, new connection"),
        ("claim", "claim, POST /api/spawn"),
    ):
        straight, through = part[name]["straight"], part[name]["through"]
        table.append([
            title, number(straight["n"]), *(f"{way[key]:.2f}" for way in (straight, through) for key in ("p50", "p99")),
            f"{through['p50'] - straight['p50']:.2f}",
        ])
    return table


def rate(part: Mapping[str, Any]) -> Table:
    table = [["8 clients", "claims a second", "times", "p50, ms", "p99, ms", "failed", "by host"]]
    rows = {name: said for name, said in part.items() if isinstance(said, dict)}
    base = next(iter(rows.values()))["a_second"]
    for name, said in rows.items():
        ms, shares = said["answer_ms"], " ".join(f"{label} {count}" for label, count in said["by_host"].items())
        table.append([
            name, number(said["a_second"]), f"{said['a_second'] / base:.2f}", number(ms["p50"]), number(ms["p99"]),
            str(said["failed"]), shares,
        ])
    return table


def killed(part: Mapping[str, Any]) -> Table:
    ms = part["answer_ms"]
    shares = " ".join(f"{label} {count}" for label, count in part["by_host"].items())
    return [
        [f"one of {part['hosts']} hosts dies", "claims", "failed", "retries", "p50, ms", "p99, ms", "slowest, ms",
         "by host"],
        ["", number(part["claims"]), str(part["failed"]), str(part["retries"]), number(ms["p50"]), number(ms["p99"]),
         number(ms["max"]), shares],
    ]


def unequal(part: Mapping[str, Any]) -> Table:
    sizes = [f"{size} places" for size in part["capacity"]]
    table = [["fleet filled to", *sizes, "fullest / fleet", "refusals", "failed"]]
    for step in part["steps"]:
        spread = step["spread"]
        table.append([
            f"{step['level']:.0%}", *(f"{share:.0%}" for share in step["share_used"]),
            f"{spread['most'] / step['level']:.2f}", str(step["refusals"]), str(part["failed"]),
        ])
    return table


def thousand(part: Mapping[str, Any]) -> Table:
    claims = part["claims"]
    table = [[f"{part['hosts']} agents, {claims} claims", "fullest host", "fullest / mean", "deviation", "Gini",
              "went to, free", "refusals", "a claim", "failed", "p50, ms", "p99, ms"]]

    def row(name: str, said: Mapping[str, Any], times: list[str]) -> list[str]:
        spread = said["spread"]
        return [
            name, f"{spread['most']:.0%}", f"{spread['most'] / spread['mean']:.2f}", f"{spread['deviation']:.3f}",
            f"{spread['gini']:.4f}", f"{said['went_free']:.1%}", str(said["refusals"]),
            f"{said['refusals'] / claims:.3f}", str(said["failed"]), *times,
        ]

    for level in part["levels"]:
        real, full = level["haproxy"], f"{level['level']:.0%} full"
        table.append(row(f"{full}: HAProxy", real, [number(real["answer_ms"][key]) for key in ("p50", "p99")]))
        for key, title in PLAYED.items():
            table.append(row(f"{full}: {title}", level["played"][key], ["-", "-"]))
    return [*table, *_cost(part, len(table[0]))]


PLAYED = {"perfect": "perfect knowledge", "fresh": "simulated, weights of now", "second": "simulated, a second old",
          "two": "simulated, emptier of two"}


def _cost(part: Mapping[str, Any], width: int) -> Iterator[list[str]]:
    """The cost of the checks, as lines of a table with its own columns."""
    checks = part["checks"]
    for name, value in {
        "agent-checks a second": f"{checks['agent_checks_a_second']:.0f}",
        "health checks a second": f"{checks['health_checks_a_second']:.0f}",
        "HAProxy at rest, % of a core": f"{checks['haproxy_cpu_percent']:.0f}",
        f"… with {part['a_second']:.0f} claims a second": f"{part['levels'][0]['haproxy']['cpu_percent']:.0f}",
        "HAProxy's memory, MiB": f"{part['haproxy_rss_mib']:.0f}",
    }.items():
        yield [name, value, *([""] * (width - 2))]


def websockets(part: Mapping[str, Any]) -> Table:
    ms = part["answer_ms"]
    return [
        ["websockets", "wanted", "open at the end", "errors", "all open after, s", "echo p50, ms", "p99, ms",
         "KiB each"],
        ["", number(part["wanted"]), number(part["open_at_the_end"]), str(part["error_count"]),
         number(part["opening_s"]), number(ms["p50"]), number(ms["p99"]), f"{part['kib_each']:.1f}"],
    ]


TABLES = {
    "latency": latency, "rate": rate, "killed": killed, "killed-agents": killed, "unequal": unequal,
    "thousand": thousand, "websockets": websockets,
}
