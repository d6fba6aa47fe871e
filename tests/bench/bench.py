#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make bench`: figures of nbagent beside its peers, on one host in one run.

    tests/bench/bench.py [--out DIRECTORY] [--rounds N] [--burst N] [--users N] [--peers N] [--only KEY,KEY…]

Makes an nspawn host of its own, installs the packages as an operator would, and beside them the peers; measures all
sides by turns, because the speed of the machine changes, and removes the host. The tables go to standard output;
bench.txt, bench.md, bench.png and bench.json, with every sample, go to DIRECTORY (default: $NBAGENT_CACHE/bench).
Absolute times hold for this machine; ratios are comparable between machines. One round takes about ten minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import aiohttp
import chart
import figures
import sides
from client import Client, Server
from figures import Column, Line
from sides import Ours, Side

import product
from product import say
from testhost_driver import Host

POLL_S = 0.005
BASE = "systemd-run"
SINGLES = {True: 5, False: 2}  # starts of one slot in a round: ours, a peer's
# Claims of each kind in a round; a slot that replaces one of the last kind starts by exec in half a second.
CLAIMS = {"fork": 40, "exec": 10}
REFILLED, REFILL_GAP_S = {"fork": 100, "exec": 20}, 0.2
SANDBOXES = 40
KERNEL_TRIES = 3

COLUMNS = [
    Column("ready", "start to ready", "s",
           "one start at a time from nothing, until the first 200 of GET api, polled every 5 ms (a hub reports "
           "itself when it is ready). Entering the test host is part of systemd-run's and podman's time, see below."),
    Column("cold", "start to result", "s",
           "the same start until the result of `1+1` in a new kernel has come by its websocket."),
    Column("cell", "claim to result", "s",
           "the time that a person waits: nbagent from POST /claim on a warm pool to the result of `1+1`; peers have "
           "no pool, so that theirs is start to result."),
    Column("idle", "memory, idle", "MiB",
           "PSS of all processes of the side, its services included, divided by its users, before any page is opened."),
    Column("kernel", "memory, kernel", "MiB", "the same, after each user has run a cell in a kernel of their own."),
    Column("taken", "MemAvailable lost", "MiB",
           "the decrease of MemAvailable from before the burst until each user has a kernel, divided by the users: "
           "includes page tables, kernel stacks and files in memory, which PSS does not count; excludes services that "
           "ran before, and pages of programs, because the kernel can read them again."),
    Column("burst", "burst: last ready", "s",
           "as many starts at once as the column `at once` gives, from nothing, until the last server answers 200.",
           of_all=True),
    Column("rate", "slots a second", "1/s", "that number divided by that time.", more_is_better=True),
]
CLAIM_COLUMNS = ("keepalive", "new", "refill", "burst", "replaced")
CLAIM_HOW = {
    "keepalive": "claim, warm pool, kept connection",
    "new": "claim, warm pool, new connection",
    "refill": "claim while the pool refills",
    "burst": "claim in the burst, pool empty",
    "replaced": "claim in a burst while the zygote is replaced",
}


class Bench:
    """One run on one host."""

    def __init__(self, host: Host, client: Client, arguments: argparse.Namespace) -> None:
        self.host, self.client, self.options = host, client, arguments
        self.lines: list[Line] = []
        self.claims: dict[str, dict[str, list[float]]] = {}
        self.parts: dict[str, list[dict[str, float]]] = {}
        self.steps: list[tuple[str, str, float, float]] = []
        self.bare: dict[str, Any] = {}
        self.loads: list[float] = []
        self.entry_ms = statistics.median(timed_ms(lambda: host.run(["true"])) for _ in range(11))

    def sides(self) -> list[tuple[Line, Side]]:
        """All sides that can run here, each with its line; a line without a side has the reason in `why`."""
        minimal = sides.image(self.host, "minimal")
        root, base, peers = minimal["root"], str(minimal["id_base"]), self.options.peers
        user = self.host.run(["stat", "-c", "%u", f"{root}/home/jovyan"]).stdout.strip()
        made: list[Side] = [Ours(self.host, self.client, "exec", "exec")]
        if minimal["launch"] == "fork":
            made.insert(0, Ours(self.host, self.client, "fork", "minimal"))
        else:
            why = f"image minimal of this checkout has launch = \"{minimal['launch']}\""
            self.lines.append(Line("fork", "nbagent, by fork", "", ours=True, why=why))
        # One slot was warm when the packages were installed.
        made[0].close()
        made.append(sides.SystemdRun(self.host, self.client, root, user, peers))
        made += [sides.Hub(self.host, self.client, spawner) for spawner in ("systemd", "local")]
        made.append(sides.Podman(self.host, self.client, root, base))
        if self.options.only:
            made = [side for side in made if side.key in self.options.only]
        pairs = []
        for side in made:
            ours = isinstance(side, Ours)
            at_once, users = (self.options.burst, self.options.users) if ours else (peers, peers)
            pairs.append((Line(side.key, side.name, side.how, ours, at_once, min(users, at_once)), side))
        self.lines += [line for line, _ in pairs]
        return pairs

    def run(self) -> None:
        """All rounds; a side that fails is left out of the others, and its line has the reason."""
        pairs = self.sides()
        for number in range(1, self.options.rounds + 1):
            for line, side in pairs:
                if line.why:
                    continue
                say(f"round {number} of {self.options.rounds}: {line.name}")
                try:
                    self.turn(line, side)
                except Exception as error:
                    line.why = " ".join(f"{type(error).__name__}: {error}".split())[:600]
                    say(f"{line.name} failed: {line.why}")
                    # Figures of an incomplete run are not comparable.
                    line.samples.clear()
                finally:
                    try:
                        side.close()
                    except Exception as error:
                        say(f"{line.name} was not closed: {error}")

    def turn(self, line: Line, side: Side) -> None:
        """One side's turn of one round."""
        side.open(line.at_once)
        for _ in range(SINGLES[line.ours]):
            line_ms = self.client.run(self.single(side))
            line.add("ready", line_ms[0] / 1000)
            line.add("cold", line_ms[1] / 1000)
            if not line.ours:
                line.add("cell", line_ms[1] / 1000)
            side.end()
        if isinstance(side, Ours):
            self.warm_claims(line, side)
            side.open(line.at_once)
        self.loads.append(os.getloadavg()[0])
        before = self.memory(side)
        began_s = time.monotonic()
        servers = self.client.run(self.burst(line, side))
        took_s = time.monotonic() - began_s
        line.add("burst", took_s)
        line.add("rate", line.at_once / took_s)
        side.end(keep=line.users)
        idle = self.memory(side)
        line.add("idle", figures.per_user(idle, line.users)["all"])
        kernels = self.client.run(self.kernels(line, servers[: line.users]))
        after = self.memory(side)
        line.add("kernel", figures.per_user(after, line.users)["all"])
        line.add("taken", figures.taken(before, after, line.users))
        self.parts.setdefault(side.key, []).append(figures.per_user(after, line.users))
        self.client.run(_close(kernels))
        side.end()
        if isinstance(side, Ours) and side.key == "fork":
            side.replace_zygote(line.at_once, lambda: self.client.run(self.burst(line, side, "replaced")))
            side.end()

    async def single(self, side: Side) -> tuple[float, float]:
        """Milliseconds to ready, and to the first result."""
        began_s = time.perf_counter()
        server = await side.start(0, POLL_S)
        ready_s = time.perf_counter()
        kernel = await self.client.first_cell(server)
        done_s = time.perf_counter()
        await kernel.close()
        return 1000 * (ready_s - began_s), 1000 * (done_s - began_s)

    def warm_claims(self, line: Line, side: Ours) -> None:
        """Claims on a warm pool: to the first result, and by themselves."""
        singles = SINGLES[True]
        side.warm(singles, singles)
        for _ in range(singles):
            line.add("cell", self.client.run(self.claimed(side)) / 1000)
        side.end()
        claims, refilled = CLAIMS[side.key], REFILLED[side.key]
        for name, new in (("keepalive", False), ("new", True)):
            side.warm(claims, claims)
            self.note(side, name, [self.client.run(self.claim_ms(side, new)) for _ in range(claims)])
            side.end()
        # With free capacity every claim would make the pool start another slot.
        side.warm(refilled // 2, 2 * refilled)
        for _ in range(refilled):
            self.note(side, "refill", [self.client.run(self.claim_ms(side))])
            time.sleep(REFILL_GAP_S)
        side.end()

    async def claimed(self, side: Ours) -> float:
        began_s = time.perf_counter()
        kernel = await self.client.first_cell(await side.claim())
        took_ms = 1000 * (time.perf_counter() - began_s)
        await kernel.close()
        return took_ms

    async def claim_ms(self, side: Ours, new: bool = False) -> float:
        began_s = time.perf_counter()
        server = await self.client.claim(side.image, new_connection=new)
        took_ms = 1000 * (time.perf_counter() - began_s)
        side.took(server)
        return took_ms

    def note(self, side: Side, name: str, samples_ms: list[float]) -> None:
        self.claims.setdefault(side.key, {}).setdefault(name, []).extend(round(value, 3) for value in samples_ms)

    async def burst(self, line: Line, side: Side, name: str = "burst") -> list[Server]:
        """All starts at once. A server that must be polled is polled less often the more there are."""
        async def one(number: int) -> Server:
            began_s = time.perf_counter()
            if isinstance(side, Ours):
                server = await side.claim()
                self.note(side, name, [1000 * (time.perf_counter() - began_s)])
                await self.client.ready(server, POLL_S)
                return server
            return await side.start(number, POLL_S * line.at_once)

        servers = await asyncio.gather(*map(one, range(line.at_once)))
        if isinstance(side, Ours):
            side.in_order(servers)
        return list(servers)

    async def kernels(self, line: Line, servers: list[Server]) -> list[Any]:
        """A kernel and its first cell for each, four at a time.

        A peer's kernel is requested again after a failure, because its users share the host's ports and jupyter_client
        closes the ports that it found free before the kernel binds them. Among 50 users one is taken at times.
        """
        turn = asyncio.Semaphore(4)

        async def one(server: Server) -> Any:
            async with turn:
                for _ in range(0 if line.ours else KERNEL_TRIES - 1):
                    try:
                        return await self.client.first_cell(server)
                    except (RuntimeError, aiohttp.ClientError) as error:
                        line.again.append(f"{type(error).__name__}: {error}"[:200])
                return await self.client.first_cell(server)

        return list(await asyncio.gather(*map(one, servers)))

    def memory(self, side: Side) -> dict[str, Any]:
        """The result of memory.py when the side is at rest."""
        time.sleep(2)
        code = (HERE / "memory.py").read_text()
        found = self.host.run(["python3", "-", side.slots, side.services], input=code, timeout=sides.TIMEOUT_S)
        document: dict[str, Any] = json.loads(found.stdout)
        return document

    # -- breakdown -----------------------------------------------------------------------------

    def isolation(self) -> list[tuple[str, str, float, float]]:
        """Part, step, milliseconds and KiB of each step of the sandbox's plan."""
        say(f"the cost of isolation: {SANDBOXES} sandboxes in step")
        self.host.copy_in([str(HERE / "isolation.py")], "/root/")
        command = ["python3", "-I", "/root/isolation.py", "minimal", str(SANDBOXES), str(512 << 20)]
        done = self.host.run(["systemd-run", "--quiet", "--wait", "--pipe", "-p", "MemoryAccounting=yes", *command])
        rows = json.loads(done.stdout)
        return [(part, step, statistics.median(took_ms), used / 1024) for part, step, took_ms, used in rows]

    def floor(self) -> dict[str, Any]:
        """A bare fork of a Python with the modules of a zygote."""
        say("a bare fork")
        root = sides.image(self.host, "minimal")["root"]
        user = self.host.run(["stat", "-c", "%u", f"{root}/home/jovyan"]).stdout.strip()
        self.host.run(["sh", "-c", sides.MOUNTS, "mounts", root, "1"])
        command = ["env", "-i", "HOME=/home/jovyan", "LANG=C.UTF-8", "PATH=/usr/local/bin:/usr/bin:/bin"]
        command += ["/usr/sbin/chroot", f"--userspec={user}:{user}", "/run/peer/0/root", "python3", "-"]
        document: dict[str, Any] = json.loads(self.host.run(command, input=(HERE / "floor.py").read_text()).stdout)
        return document

    def breakdown(self) -> list[list[str]]:
        """The time and memory of a slot by part: a table whose last lines are the bare fork."""
        self.steps, self.bare = self.isolation(), self.floor()
        steps, floor = self.steps, self.bare
        ours = [line for line in self.lines if line.ours and line.samples]
        table = [["", *(f"{line.name}, {unit}" for line in ours for unit in ("ms", "MiB"))]]
        walls_ms = sum(took_ms for *_, took_ms, _ in steps)
        named: dict[str, list[str]] = {}

        def put(what: str, number: int, took_ms: float | None, used: float | None) -> None:
            cells = named.setdefault(what, ["-"] * (2 * len(ours)))
            cells[2 * number : 2 * number + 2] = ["-" if v is None else figures.number(v) for v in (took_ms, used)]

        for number, line in enumerate(ours):
            claim_ms = statistics.median(self.claims[line.key]["keepalive"])
            ready_ms, cold_ms = (1000 * (line.median(name) or 0) for name in ("ready", "cold"))
            found = self.parts[line.key]
            parts = {part: statistics.median(turn[part] for turn in found) for part in found[0]}
            lost = line.median("taken") or 0
            put("claim: API, control, answer; all services", number, claim_ms, parts["services"])
            put("isolation: namespaces, root, limits, identity; init", number, walls_ms, parts["init"])
            starts_ms, both = ready_ms - claim_ms - walls_ms, parts["fork_server"] + parts["server"]
            put("scope, start of the server, until it answers; fork server", number, starts_ms, both)
            put("kernel, until its first result", number, cold_ms - ready_ms, parts["kernel"])
            own = parts[figures.KERNEL]
            put("kernel memory: page tables, stacks, inodes", number, None, own)
            put("total", number, cold_ms, parts["all"] + own)
            put("decrease of MemAvailable", number, None, lost)
            floor_ms, floor_mib = statistics.median(floor["took_ms"]), floor["taken"] / 1024
            put("a bare fork (200, idle)", number, floor_ms, floor_mib)
            put("above two bare forks", number, cold_ms - 2 * floor_ms, lost - 2 * floor_mib)
        return table + [[what, *cells] for what, cells in named.items()]


async def _close(kernels: list[Any]) -> None:
    await asyncio.gather(*(kernel.close() for kernel in kernels))


BREAKDOWN_HOW = """\
Time and memory of one user by part, from nothing to the first result. Time: medians of this run; isolation is the sum
of the steps of `nbagent slot plan`, each done side by side by 40 sandboxes (tests/bench/isolation.py); the claim is
on a warm pool. Memory: PSS by process at the users of the table above, services divided by the users; kernel memory
is the amount charged to the slots' cgroups. A bare fork: a Python with JupyterLab and ipykernel imported forks
children that do nothing (tests/bench/floor.py), from fork() to the first byte of the child, and the decrease of
MemAvailable. A user has two active processes, a server and a kernel, so the last line is the cost above two bare
forks."""


def timed_ms(action: Any) -> float:
    began_s = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - began_s)


def conditions(bench: Bench, began_s: float) -> str:
    """The conditions of the run, for the reader."""
    say_what = ". /etc/os-release; echo $PRETTY_NAME; systemctl --version | head -n 1; podman --version"
    debian, systemd, podman = bench.host.run(["sh", "-c", say_what]).stdout.splitlines()
    warnings = bench.host.run(["journalctl", "-q", "-t", "nbagent", "-p", "warning"], check=False).stdout.splitlines()
    for warning in warnings:
        say(f"warning in the journal: {warning}")
    loads = bench.loads or [os.getloadavg()[0]]
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC; one nspawn host ({debian}, {systemd}, {podman}), "
        f"{os.cpu_count()} processors, {memory_gib:.0f} GiB, Linux {platform.release()}; "
        f"load average {min(loads):.1f} to {max(loads):.1f}; "
        f"rounds: {bench.options.rounds}, in {time.monotonic() - began_s:.0f} s. "
        f"The client used {bench.client.cpu_s:.1f} s of a processor; "
        f"entering the host takes {bench.entry_ms:.0f} ms of each start of systemd-run and podman."
        + f" Warnings of the agent in its journal: {len(warnings)}." * bool(warnings)
    )


def claims_table(bench: Bench) -> list[list[str]]:
    """The claims of nbagent, in milliseconds."""
    table = [["claims, ms", "n", "p50", "p90", "p99", "max"]]
    for line in bench.lines:
        for name in CLAIM_COLUMNS:
            if samples := bench.claims.get(line.key, {}).get(name):
                said = figures.latency(samples)
                cells = [figures.number(said[key]) for key in ("p50", "p90", "p99", "max")]
                table.append([f"{line.name}: {CLAIM_HOW[name]}", str(len(samples)), *cells])
    return table


def write(out: Path, bench: Bench, about: str, base: Line, broken: list[list[str]]) -> str:
    """Writes the files; returns the text."""
    out.mkdir(parents=True, exist_ok=True)
    steps = [["step of the sandbox", "ms", "KiB"]]
    steps += [[f"{part}: {step}", f"{ms:.2f}", f"{kib:.0f}"] for part, step, ms, kib in bench.steps]
    tables = [*figures.comparison(bench.lines, COLUMNS, base), claims_table(bench), broken, steps]
    said = figures.notes(bench.lines, COLUMNS)
    sections = [
        (tables[0], "Medians, in brackets least and most. " + about), (tables[1], ""), (tables[2], ""),
        (tables[3], BREAKDOWN_HOW), (tables[4], ""),
    ]
    text = "\n\n".join(
        "\n\n".join(part for part in (figures.columns_of(table), below) if part) for table, below in sections
    ) + "\n\n" + "\n".join(f"· {line}" for line in said) + "\n"
    marked = "\n\n".join(
        "\n\n".join(part for part in (figures.markdown(table), below) if part) for table, below in sections
    ) + "\n\n" + "\n".join(f"- {line}" for line in said) + "\n"
    (out / "bench.txt").write_text(text)
    (out / "bench.md").write_text(marked)
    document = {
        "about": about, "base": base.key, "lines": [line.document() for line in bench.lines], "claims": bench.claims,
        "memory": bench.parts, "isolation": bench.steps, "floor": bench.bare, "breakdown": broken,
        "columns": [{"key": c.key, "heading": c.heading, "unit": c.unit, "how": c.how} for c in COLUMNS],
    }
    (out / "bench.json").write_text(json.dumps(document, indent=1) + "\n")
    chart.draw(out / "bench.png", bench.lines, COLUMNS, base, about)
    say(f"written: {out}/bench.txt, bench.md, bench.png and bench.json")
    return text


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=sides.OUT, help="where the files go")
    parser.add_argument("--rounds", type=int, default=3, choices=range(1, 21), metavar="N", help="default: 3")
    parser.add_argument("--burst", type=int, default=100, metavar="N", help="slots of nbagent at once; default: 100")
    parser.add_argument("--users", type=int, default=50, metavar="N", help="users of nbagent, for memory; default: 50")
    parser.add_argument("--peers", type=int, default=50, metavar="N", help="slots and users of a peer; default: 50")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="KEY,…", help="only these sides")
    return parser.parse_args(argv)


def main() -> None:
    """Measures, prints, writes."""
    arguments = parse()
    # SIGTERM raises SystemExit, so that the host is still taken down.
    began_s = time.monotonic()
    packages = product.build(say)
    # Before the host is up, because it takes a minute the first time.
    sides.built_hub()
    with Host.up(name=f"bench-{os.getpid()}", packages=sides.PACKAGES) as host:
        product.install(host, packages, sides.SETTINGS)
        sides.add_exec_image(host, sides.image(host, "minimal")["root"])
        with Client(host) as client:
            bench = Bench(host, client, arguments)
            bench.run()
            failed = [line.name for line in bench.lines if line.ours and line.how and line.why]
            try:
                broken = bench.breakdown()
            except Exception as error:
                # The figures that took an hour to measure are kept in spite of this failure.
                failed.append(f"breakdown: {error}"[:500])
                broken = [["no breakdown"], [failed[-1]]]
            about = conditions(bench, began_s)
    measured = [line for line in bench.lines if line.samples]
    if not measured:
        raise SystemExit("no side could be measured: " + "; ".join(line.why for line in bench.lines))
    base = next((line for line in measured if line.key == BASE), measured[-1])
    print(write(arguments.out, bench, about, base, broken))
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
