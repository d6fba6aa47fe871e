#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make bench-neighbour`: the delay of ten users' cells beside one user who loads the host, by side.

    tests/bench/neighbour.py [--rounds N] [--users N] [--seconds N] [--only KEY,…] [--noises NAME,…] [--out DIRECTORY]

On a host of its own: for nbagent by fork, systemd-run and podman with the same limits (MemoryMax=1G, no swap,
CPUWeight=100, TasksMax=256), N users run a cell a second, at phases spread over the second. The latency is measured on
the quiet host, and then during each load of noises.py, which another user of the same side runs. The users' client has
SCHED_FIFO, so that its own delay beside a load is not measured. The loading user's server is
ended after the load, and quiet windows alternate with the loads because the speed of the machine changes. Prints the
median over the rounds of p50, p99 and their ratio to the quiet windows of the same round, and writes neighbour.txt,
neighbour.md and neighbour.json, with every sample, to DIRECTORY (default: $NBAGENT_CACHE/bench). One round of one side
takes three minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import aiohttp
import figures
import noises
import sides
from client import Client, Kernel, Server
from sides import Ours, Side

import product
from product import say
from testhost_driver import Host

POLL_S = 0.02
KERNEL_TRIES = 3
CELL, RESULT = "1+1", "2"
PERIOD_S = 1.0
QUIET_S = 4.0
# The load starts before its window, and ends by itself after it.
HEAD_S, TAIL_S = 1.5, 2.0
QUIET = "quiet"
# Popen's child is in a session of its own, so that the kernel's interrupts do not reach it.
START = """\
import subprocess
subprocess.Popen(["python3", "-c", {source!r}, {name!r}, "{seconds}"], start_new_session=True,
                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid > 0
"""


class SameWeight(Ours):
    """This project with slots.cpu_weight_busy = 1, so that a slot that computes keeps its weight."""

    file = "/etc/nbagent/conf.d/70-weight.toml"

    def __init__(self, host: Host, client: Client) -> None:
        super().__init__(host, client, "fork", "minimal")
        self.key, self.name = "same-weight", "nbagent, cpu_weight_busy = 1"

    def open(self, count: int) -> None:
        self.host.run(["tee", self.file], input="[slots]\ncpu_weight_busy = 1\n")
        super().open(count)
        product.wait_complete(self.host, self.image)

    def close(self) -> None:
        self.host.run(["rm", "-f", self.file])
        super().close()


class Neighbour:
    """One run on one host. `samples_ms` has, by side and round, the latencies by load."""

    def __init__(self, host: Host, client: Client, options: argparse.Namespace) -> None:
        self.host, self.client, self.options = host, client, options
        self.samples_ms: dict[str, list[dict[str, list[float]]]] = {}
        self.names: dict[str, str] = {}
        self.how: dict[str, str] = {}
        self.failures: list[str] = []
        self.loads: list[float] = []
        self.busy: dict[str, dict[str, float]] = {}

    def sides(self) -> list[Side]:
        minimal = sides.image(self.host, "minimal")
        root, base = minimal["root"], str(minimal["id_base"])
        user = self.host.run(["stat", "-c", "%u", f"{root}/home/jovyan"]).stdout.strip()
        makers = {
            "fork": lambda: Ours(self.host, self.client, "fork", "minimal"),
            "same-weight": lambda: SameWeight(self.host, self.client),
            "systemd-run": lambda: sides.SystemdRun(self.host, self.client, root, user, self.options.users + 1),
            "podman": lambda: sides.Podman(self.host, self.client, root, base),
        }
        made: list[Side] = [make() for key, make in makers.items() if key in self.options.only]
        self.names = {side.key: side.name for side in made}
        self.how = {side.key: side.how for side in made}
        return made

    def run(self) -> None:
        made = self.sides()
        # One slot was warm when the packages were installed.
        Ours(self.host, self.client, "fork", "minimal").close()
        for number in range(1, self.options.rounds + 1):
            for side in made:
                say(f"round {number} of {self.options.rounds}: {side.name}")
                try:
                    self.turn(side)
                finally:
                    side.close()

    def turn(self, side: Side) -> None:
        """One side's turn of one round."""
        users = self.options.users
        side.open(users + 1)
        found: dict[str, list[float]] = {QUIET: []}
        self.samples_ms.setdefault(side.key, []).append(found)
        kernels = self.client.run(self.all_kernels(side, users))
        self.client.run(self.window(kernels, 2 * PERIOD_S, QUIET))
        try:
            for name in self.options.noises:
                noisy = self.client.run(self.server(side, users))
                kernel = self.client.run(self.kernel(noisy))
                self.loads.append(os.getloadavg()[0])
                found[QUIET] += self.client.run(self.window(kernels, QUIET_S, QUIET))
                seconds = HEAD_S + self.options.seconds + TAIL_S
                source = (HERE / "noises.py").read_text()
                self.client.run(kernel.run(START.format(source=source, name=name, seconds=seconds)))
                time.sleep(HEAD_S)
                found[name] = self.client.run(self.window(kernels, self.options.seconds, f"{side.key} {name}"))
                self.client.run(kernel.close())
                side.end(keep=users)
                said = figures.latency(found[name])
                say(f"{side.key} {name}: p50 {said['p50']} ms, p99 {said['p99']} ms")
            said = figures.latency(found[QUIET])
            say(f"{side.key} quiet: p50 {said['p50']} ms, p99 {said['p99']} ms")
        finally:
            self.client.run(_close(kernels))

    async def server(self, side: Side, number: int) -> Server:
        return await side.start(number, POLL_S)

    async def all_kernels(self, side: Side, users: int) -> list[Kernel]:
        turn = asyncio.Semaphore(2)

        async def one(number: int) -> tuple[Server, Kernel]:
            async with turn:
                server = await self.server(side, number)
                return server, await self.kernel(server)

        made = await asyncio.gather(*map(one, range(users)))
        if isinstance(side, Ours):
            side.in_order([server for server, _ in made])
        return [kernel for _, kernel in made]

    async def kernel(self, server: Server) -> Kernel:
        """A kernel that ran a cell; requested again after a failure, because users of a peer share the ports."""
        for _ in range(KERNEL_TRIES - 1):
            try:
                return await self.client.first_cell(server)
            except (RuntimeError, aiohttp.ClientError) as error:
                say(f"a kernel is requested again: {error}"[:200])
        return await self.client.first_cell(server)

    async def window(self, kernels: list[Kernel], seconds: float, load: str) -> list[float]:
        """Each user's cells at a period of a second; the latencies in milliseconds, from the time of the request.

        A cell is requested when its turn has come or the cell before has ended, whichever is later.
        """
        began_s = time.perf_counter()

        async def one(number: int, kernel: Kernel) -> list[float]:
            took_ms = []
            next_s = began_s + PERIOD_S * number / len(kernels)
            while next_s < began_s + seconds:
                await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
                sent_s = time.perf_counter()
                try:
                    if (text := await kernel.run(CELL)) != RESULT:
                        raise RuntimeError(f"{CELL} is {text!r}")
                    took_ms.append(1000 * (time.perf_counter() - sent_s))
                except (RuntimeError, OSError) as error:
                    self.failures.append(f"{load}: {type(error).__name__}: {error}"[:300])
                next_s = max(next_s + PERIOD_S, time.perf_counter())
            return took_ms

        found = await asyncio.gather(*(one(number, kernel) for number, kernel in enumerate(kernels)))
        return [took_ms for one_user in found for took_ms in one_user]


async def _close(kernels: list[Kernel]) -> None:
    await asyncio.gather(*(kernel.close() for kernel in kernels))


def table(found: Neighbour) -> list[list[str]]:
    """A line for each load; for each side p50, p99 and the ratio of p99 to that of the quiet host."""
    heading = ["load"]
    for name in found.names.values():
        heading += [f"{name}: p50", "p99, ms", "p99 / quiet"]
    rows = [heading]
    for load in (QUIET, *found.options.noises):
        row = [load]
        for rounds in found.samples_ms.values():
            said = figures.beside_quiet(rounds, load, QUIET)
            row += [figures.number(said["p50"]), figures.number(said["p99"]), figures.number(said["ratio"])]
        rows.append(row)
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, choices=range(1, 21), metavar="N", help="default: 3")
    parser.add_argument("--users", type=int, default=10, metavar="N", help="users who run cells; default: 10")
    parser.add_argument("--seconds", type=float, default=10, metavar="N", help="measured of each load; default: 10")
    parser.add_argument("--only", type=words, default=["fork", "systemd-run", "podman"], metavar="KEY,…",
                        help="only these sides: fork, systemd-run, podman; or same-weight, which is fork without "
                        "slots.cpu_weight_busy")
    parser.add_argument("--noises", type=words, default=list(noises.NOISES), metavar="NAME,…",
                        help=f"only these loads: {', '.join(noises.NOISES)}")
    parser.add_argument("--out", type=Path, default=sides.OUT, help="where the files go")
    options = parser.parse_args(argv)
    if unknown := set(options.noises) - set(noises.NOISES):
        parser.error(f"unknown loads: {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    """Measures, prints, writes."""
    options = parse()
    began_s = time.monotonic()
    packages = product.build(say)
    with Host.up(name=f"near-{os.getpid()}", packages=sides.PACKAGES) as host:
        product.install(host, packages, sides.SETTINGS)
        with Client(host, at_once=True) as client:
            found = Neighbour(host, client, options)
            found.run()
    write(found, time.monotonic() - began_s)


def write(found: Neighbour, took_s: float) -> None:
    """Prints the table and writes the files."""
    options = found.options
    about = (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} processors, "
        f"Linux {platform.release()}; {options.users} users, rounds: {options.rounds}, {options.seconds:.0f} s of each "
        f"load, in {took_s:.0f} s; load average at the quiet windows {min(found.loads):.1f} to {max(found.loads):.1f}; "
        f"the users' client has {found.client.policy}."
    )
    rows = table(found)
    below = "\n".join(f"{found.names[key]}: {how}" for key, how in found.how.items())
    if found.failures:
        about += f" Cells without a result, which are not in the table: {len(found.failures)}, {found.failures[0]}"
    text = f"{figures.columns_of(rows)}\n\n{about}\n{below}\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "neighbour.txt").write_text(text)
    (options.out / "neighbour.md").write_text(f"{figures.markdown(rows)}\n\n{about}\n")
    document: dict[str, Any] = {"about": about, "samples_ms": found.samples_ms}
    (options.out / "neighbour.json").write_text(json.dumps(document, indent=1) + "\n")
    print(text)
    say(f"written: {options.out}/neighbour.txt, neighbour.md and neighbour.json")


if __name__ == "__main__":
    main()
