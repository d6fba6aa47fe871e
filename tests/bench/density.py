#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make bench-density`: how many live users one host holds, and the cost of each.

    tests/bench/density.py [--users N] [--pages] [--image NAME] [--concurrency N] [--minutes N] [--out DIRECTORY]

On a host of its own: claims N slots through the API, starts a kernel in each through the router and runs a cell,
keeps all their websockets open, and then runs a cell in every one again. With --pages the first cell is that of the
welcome notebook in Chromium, one user after another, which leaves the page for the next user's. Prints, and writes
density.txt, density.json and, as a line of a table, density.md to DIRECTORY (default: $NBAGENT_CACHE/bench). Stops
adding users when less than 1 GiB of the machine's memory is available or --minutes are over, then reports the number,
measures the present users and ends with status 1; it also ends with status 1 after a failed request or an OOM kill. The
host is removed in every case.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import functools
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import figures
import page
import sides
from client import Client, Kernel, Server
from sides import NOTHING, Ours

import browser
import product
from product import API_PORT, say
from testhost_driver import Host, netns

WAVE = 50
FEW = 10
PROBES = 100
IDLE_S = 30
LEAST_AVAILABLE = 1 << 30
UNITS = ("nbagent.service", "nbagent-api.service", "nbagent-router.service")


class TooSmall(Exception):
    """Memory or time does not suffice for another user."""


class Density:
    """One run on one host."""

    def __init__(self, host: Host, client: Client, options: argparse.Namespace) -> None:
        self.host, self.client, self.options = host, client, options
        self.side = Ours(host, client, sides.image(host, options.image)["launch"], options.image)
        self.kernels: list[Kernel] = []
        self.claimed: list[Server] = []
        self.live: list[Server] = []
        self.claim_ms: list[float] = []
        self.first_ms: list[float] = []
        self.claiming_s = 0.0
        self.at_rest: dict[str, Any] | None = None
        self.failures: list[str] = []
        self.deadline_s = time.monotonic() + 60 * options.minutes

    def run(self) -> dict[str, Any]:
        """Runs all parts; returns the figures."""
        wanted = self.options.users
        # All slots at once, so that their memory is measured before the first has a page.
        self.most = wanted if self.options.pages else WAVE
        # The settings admit all users, so that only the machine bounds their number.
        self.side.open(wanted + PROBES)
        kills = oom_kills()
        stopped, at_few, before = "", None, self.memory()
        try:
            while len(self.kernels) < wanted:
                few = at_few is None and wanted > FEW and not self.options.pages
                self.wave(min(FEW if few else self.most, wanted - len(self.kernels)))
                say(f"{len(self.kernels)} users, {available() >> 20} MiB available")
                if few:
                    at_few = self.probe()
        except TooSmall as error:
            stopped = str(error)
            say(f"stopped at {len(self.kernels)} users of {wanted}: {stopped}")
            if self.failures:
                # The lines that an operator would read, printed because the host is removed.
                found = "Error|Traceback|zygote .* failed|unexpectedly"
                journal = ["journalctl", "--no-pager", "-o", "cat", "-n", "40", "-g", found]
                say(self.host.run(journal, check=False).stdout)
            # Slots of the last wave without a kernel have no user, so their memory would count for the other users.
            self.side.in_order([*self.live, *(server for server in self.claimed if server not in self.live)])
            self.side.end(keep=len(self.live))
        users = len(self.kernels)
        if not users:
            raise SystemExit(f"not one user: {stopped} {self.failures[:3]}")
        say("a second cell in every one")
        second_ms = self.client.run(self.cells())
        say("memory, and half a minute of idling")
        after, idle = self.memory(), self.idle()
        probed = None if stopped else self.probe()
        listing_ms = [self.client.run(self.listing()) for _ in range(5)]
        return {
            "image": self.options.image, "launch": self.side.key, "wanted": wanted, "users": users, "stopped": stopped,
            "failures": self.failures, "oom_kills": oom_kills() - kills,
            "claims_per_s": round(len(self.claim_ms) / self.claiming_s, 2),
            "claim_ms": figures.latency(self.claim_ms), "first_cell_ms": figures.latency(self.first_ms),
            "second_cell_ms": figures.latency(second_ms) if second_ms else None, "second_cells": len(second_ms),
            "at_rest_mib_a_slot": self.at_rest and figures.per_user(self.at_rest, len(self.claimed)),
            "mib_a_user": figures.per_user(after, users), "available_mib_a_user": figures.taken(before, after, users),
            "grown_mib_a_user": {
                name: (after["meminfo"][name] - before["meminfo"][name]) / users / 1024
                for name in ("PageTables", "KernelStack", "Slab", "Shmem")
            },
            "processes": after["total"]["processes"], "threads": after["total"]["threads"],
            "services_mib_a_user": {unit: pss / users / 1024 for unit, pss in sorted(after["services"].items())},
            "private_mib": {role: found["private"] / users / 1024 for role, found in after["roles"].items()},
            "memory_took_s": after["took_s"], "idle": idle, "slots_ms": statistics.median(listing_ms),
            "warm_claim_ms": {"few": at_few, "all": probed},
            "client": {"cpu_s": round(self.client.cpu_s, 1), "rss_mib": rss_mib()},
        }

    def wave(self, count: int) -> None:
        """Adds `count` users: all claim, then all start a kernel and run a cell."""
        began_s = time.monotonic()
        servers = self.client.run(self.at_a_time(count, lambda _: self.claim()))
        self.claiming_s += time.monotonic() - began_s
        for server in servers:
            self.side.took(server)
        self.claimed += servers
        # A claim without a kernel is not counted as a user.
        if self.options.pages:
            self.at_rest = self.memory()
            self.pages(servers)
        else:
            started = self.at_a_time(len(servers), lambda number: self.first_cell(servers[number]))
            self.kernels += self.client.run(started)
        if len(servers) < count or self.failures:
            raise TooSmall(self.failures[-1] if self.failures else self.shortage())

    async def at_a_time(self, count: int, work: Callable[[int], Awaitable[Any]]) -> list[Any]:
        """Runs `work` for each number, some at a time, until one fails or memory is short; returns the results."""
        turn, done = asyncio.Semaphore(self.options.concurrency), []

        async def one(number: int) -> None:
            async with turn:
                if self.failures or self.shortage():
                    return
                try:
                    done.append(await work(number))
                except Exception as error:
                    self.failures.append(f"{type(error).__name__}: {error}"[:400])

        await asyncio.gather(*map(one, range(count)))
        return done

    def shortage(self) -> str:
        """The reason why no further user fits; '' when one does."""
        if (left := available()) < LEAST_AVAILABLE:
            return f"{left >> 20} MiB of memory are available, less than {LEAST_AVAILABLE >> 20}"
        return f"{self.options.minutes} minutes are over" if time.monotonic() > self.deadline_s else ""

    async def claim(self) -> Any:
        began_s = time.perf_counter()
        server = await self.client.claim(self.options.image)
        self.claim_ms.append(1000 * (time.perf_counter() - began_s))
        return server

    async def first_cell(self, server: Any) -> Kernel:
        began_s = time.perf_counter()
        kernel = await self.client.first_cell(server)
        self.first_ms.append(1000 * (time.perf_counter() - began_s))
        self.live.append(server)
        return kernel

    def pages(self, servers: list[Any]) -> None:
        """Opens the page of each user, one after another in one browser, and runs its first cell."""
        with tempfile.TemporaryDirectory() as directory, browser.chromium(Path(directory)) as window:
            page.prepare(window)
            for number, server in enumerate(servers):
                if self.shortage():
                    return
                try:
                    url = f"{server.url}{page.NOTEBOOK}?token={server.token}"
                    found = page.measure(window, functools.partial(window.open, url), self.options.out)
                    self.kernels.append(self.client.run(self.client.attach(server)))
                except Exception as error:
                    self.failures.append(f"page: {type(error).__name__}: {error}"[:400])
                    return
                self.first_ms.append(found["result"])
                self.live.append(server)
                window.driver.get("about:blank")
                if number % FEW == 0:
                    say(f"page {number + 1} of {len(servers)}")

    async def cells(self) -> list[float]:
        """Runs a cell in every kernel, some at a time; returns the times."""
        turn, took_ms = asyncio.Semaphore(self.options.concurrency), []

        async def one(kernel: Kernel) -> None:
            async with turn:
                began_s = time.perf_counter()
                try:
                    text = await kernel.run("6*7")
                except Exception as error:
                    self.failures.append(f"second cell: {type(error).__name__}: {error}"[:400])
                    return
                took_ms.append(1000 * (time.perf_counter() - began_s))
                if text != "42":
                    self.failures.append(f"6*7 is {text!r}")

        await asyncio.gather(*map(one, self.kernels))
        return took_ms

    def probe(self) -> dict[str, float]:
        """Times claims on a warm pool, one after another, beside the present users, and releases them."""
        here = len(self.kernels)
        self.side.warm(PROBES, here + PROBES)
        took_ms, probes = [], []
        for _ in range(PROBES):
            began_s = time.perf_counter()
            probes.append(self.client.run(self.client.claim(self.options.image)))
            took_ms.append(1000 * (time.perf_counter() - began_s))
        self.side.configure(0, self.options.users + PROBES)
        for server in probes:
            self.side.api.delete(f"/slots/{server.slot}")
        self.side.warm(0, self.options.users + PROBES)
        return figures.latency(took_ms)

    async def listing(self) -> float:
        """GET /slots, read whole, in milliseconds."""
        began_s = time.perf_counter()
        async with self.client.http.get(f"http://127.0.0.1:{API_PORT}/slots") as answer:
            await answer.read()
        return 1000 * (time.perf_counter() - began_s)

    def idle(self) -> dict[str, Any]:
        """Processor time of the services in half a minute without activity, and their RSS."""
        before, used_before, began_s = {unit: self.unit(unit) for unit in UNITS}, machine_busy_s(), time.monotonic()
        time.sleep(IDLE_S)
        after, took_s = {unit: self.unit(unit) for unit in UNITS}, time.monotonic() - began_s
        found: dict[str, Any] = {
            unit: {
                "cpu_percent": round(100 * (after[unit]["cpu_s"] - before[unit]["cpu_s"]) / took_s, 2),
                "rss_mib": round(after[unit]["rss"] / 1024, 1),
            }
            for unit in UNITS
        }
        found["machine_cpu_percent"] = round(100 * (machine_busy_s() - used_before) / took_s, 1)
        return found

    def unit(self, name: str) -> dict[str, float]:
        document: dict[str, float] = self.measured(NOTHING, NOTHING, name)["unit"]
        return document

    def memory(self) -> dict[str, Any]:
        """The result of memory.py when the host is at rest."""
        time.sleep(3)
        return self.measured(self.side.slots, self.side.services)

    def measured(self, *arguments: str) -> dict[str, Any]:
        code = (HERE / "memory.py").read_text()
        done = self.host.run(["python3", "-", *arguments], input=code, timeout=sides.TIMEOUT_S)
        document: dict[str, Any] = json.loads(done.stdout)
        return document


def available() -> int:
    """MemAvailable of the machine, in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("no MemAvailable in /proc/meminfo")


def oom_kills() -> int:
    """The number of OOM kills in all cgroups since boot."""
    words = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(words["oom_kill"])


def machine_busy_s() -> float:
    """Processor seconds that were not idle, of all processors."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def rss_mib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def report(found: dict[str, Any]) -> str:
    """The figures as text."""
    memory = found["mib_a_user"]
    waits = {
        "claim": found["claim_ms"], "kernel and first cell": found["first_cell_ms"],
        "second cell": found["second_cell_ms"],
        f"claim, warm pool, at {FEW} users": found["warm_claim_ms"]["few"],
        "claim, warm pool, at all users": found["warm_claim_ms"]["all"],
    }
    headings = ("n", "p50", "p90", "p99", "max")
    rows = [["latency, ms", *headings]]
    rows += [[name, *(figures.number(said[heading]) for heading in headings)] for name, said in waits.items() if said]
    parts = [["memory, MiB a user", ""]]
    shown = {name: value for name, value in memory.items() if value and name not in ("all", figures.KERNEL)}
    parts += [[f"PSS, {name}", f"{value:.2f}"] for name, value in shown.items()]
    parts += [[f"  {unit}", f"{value:.2f}"] for unit, value in found["services_mib_a_user"].items()]
    parts += [["PSS of everything", f"{memory['all']:.2f}"]]
    if rest := found["at_rest_mib_a_slot"]:
        parts += [[f"  before the page, {name}", f"{value:.2f}"] for name, value in rest.items() if value]
    parts += [["kernel memory in the slots' cgroups", f"{memory[figures.KERNEL]:.2f}"]]
    parts += [[f"  /proc/meminfo, {name}", f"{value:.2f}"] for name, value in found["grown_mib_a_user"].items()]
    parts += [["MemAvailable lost", f"{found['available_mib_a_user']:.2f}"]]
    services = [["idle, services", "% of a core", "RSS, MiB"]]
    services += [[unit, str(found["idle"][unit]["cpu_percent"]), str(found["idle"][unit]["rss_mib"])] for unit in UNITS]
    client, idle = found["client"], found["idle"]
    first = f"{found['users']} users of {found['wanted']} wanted, image {found['image']} by {found['launch']}"
    if found["stopped"]:
        first += f"; stopped: {found['stopped']}"
    facts = [
        f"{found['claims_per_s']} claims a second", f"GET /slots {found['slots_ms']:.0f} ms",
        f"{found['second_cells']} second cells answered", f"{found['oom_kills']} OOM kills",
        f"{found['processes']} processes with {found['threads']} threads",
        f"the whole machine {idle['machine_cpu_percent']} % of a core while idle",
    ]
    last = f"The client, on the same processors: {client['cpu_s']} s of one, at most {client['rss_mib']} MiB."
    tables = [figures.columns_of(table) for table in (rows, parts, services)]
    failed = [f"FAILED: {failure}" for failure in found["failures"][:10]]
    return "\n\n".join([first, "; ".join(facts), *tables, f"{last} {found['about']}", *failed]) + "\n"


def line(found: dict[str, Any]) -> str:
    """The run as one line of a table, in Markdown, below its headings."""
    second, supervisor = found["second_cell_ms"] or {"p99": float("nan")}, found["idle"][UNITS[0]]
    cells = {
        "started by": found["launch"], "users": f"{found['users']} of {found['wanted']}",
        "claims/s": str(found["claims_per_s"]), "first cell p99, ms": figures.number(found["first_cell_ms"]["p99"]),
        "second cell p99, ms": figures.number(second["p99"]), "PSS a user, MiB": f"{found['mib_a_user']['all']:.1f}",
        "MemAvailable a user, MiB": f"{found['available_mib_a_user']:.1f}", "OOM kills": str(found["oom_kills"]),
        "supervisor idle, % of a core": str(supervisor["cpu_percent"]), "its RSS, MiB": str(supervisor["rss_mib"]),
        "GET /slots, ms": figures.number(found["slots_ms"]),
    }
    return figures.markdown([list(cells), list(cells.values())]) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--users", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--pages", action="store_true", help="a page of JupyterLab in Chromium for each user")
    parser.add_argument("--image", default="minimal", choices=("minimal", "exec"), help="exec: minimal, by exec")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="users who act at a time; default: 8")
    parser.add_argument("--minutes", type=float, default=20, metavar="N", help="no more users after it; default: 20")
    parser.add_argument("--out", type=Path, default=sides.OUT, help="where the files go")
    return parser.parse_args(argv)


def main() -> None:
    """Measures, prints, writes; status 1 when a user was not served."""
    options = parse()
    # A websocket for each user.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    packages = product.build(say)
    with Host.up(name=f"dens-{os.getpid()}") as host:
        product.install(host, packages, sides.SETTINGS)
        if options.image == "exec":
            sides.add_exec_image(host, sides.image(host, "minimal")["root"])
        with Client(host) as client:
            # The browser is a child of this thread.
            netns.enter(netns.path_of(host.name))
            found = Density(host, client, options).run()
    found["about"] = (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} processors, "
        f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB, Linux {platform.release()}."
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "density.json").write_text(json.dumps(found, indent=1) + "\n")
    text = report(found)
    (options.out / "density.txt").write_text(text)
    (options.out / "density.md").write_text(line(found))
    print(text)
    say(f"written: {options.out}/density.txt, density.md and density.json")
    sys.exit(bool(found["stopped"] or found["failures"] or found["oom_kills"]))


if __name__ == "__main__":
    main()
