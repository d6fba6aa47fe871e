#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make bench-compressed`: the memory of a slot at rest when it is compressed, and the cost of its next cell.

    tests/bench/compressed.py [--slots N] [--algorithm NAME]

On a virtual machine of its own, because it needs cgroup v2: claims N slots, starts a kernel in each through the
router and runs a cell, lets all of them be compressed, and runs cells again. Prints a table for
packaging/docs/benchmarks.md. Memory figures are repeatable; times of an emulated machine are comparable only with
each other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import product
from notebook import Kernel, Notebook
from product import Api, say
from testhost_driver import Host

SETTINGS = '[slots]\nstart_timeout = "5min"\n[pool]\nwarm = 1\n[cull]\ninterval = "1s"\n'
CELL = "1 + 1"
PATIENCE_S = 300
MB = 1e6


class Rest:
    """One run on one host."""

    def __init__(self, host: Host, algorithm: str) -> None:
        self.host, self.api = host, Api(host)
        self.run("modprobe zram; cd /sys/block/zram0; echo $0 >comp_algorithm; echo 2G >disksize", algorithm)
        self.run("mkswap -q /dev/zram0; swapon /dev/zram0")
        self.compress("never")
        self.kernels: list[tuple[str, Kernel]] = []

    def run(self, script: str, *arguments: str) -> str:
        """Runs a script on the host; returns its output."""
        return str(self.host.run(["sh", "-ec", script, *arguments], timeout=120).stdout)

    def compress(self, after: str) -> None:
        """Sets cull.compress."""
        self.host.run(["tee", "/etc/nbagent/conf.d/90-bench.toml"], input=f'[cull]\ncompress = "{after}"\n')
        self.run("systemctl reload nbagent.service")

    def claim(self) -> None:
        """One more slot, with a kernel."""
        product.wait_warm(self.host)
        notebook = Notebook(self.host, self.api.claim())
        self.kernels.append((notebook.slot, notebook.kernel()))

    def cells(self) -> float:
        """Runs a cell in every slot; the median, in seconds."""
        return statistics.median(timed(lambda kernel=kernel: kernel.run(CELL, 120)) for _, kernel in self.kernels)

    def memory(self) -> list[tuple[int, int]]:
        """Bytes of each slot in memory, and in zram before compression."""
        found = [self.api.get(f"/slots/{slot}").json() for slot, _ in self.kernels]
        return [(slot["memory_bytes"], slot["swapped_bytes"]) for slot in found]

    def stored(self) -> float:
        """Bytes of memory that zram uses for each byte that it holds."""
        held, _, taken, *_ = map(int, self.run("cat /sys/block/zram0/mm_stat").split())
        return taken / held

    def row(self, name: str, cell_s: float | None) -> str:
        """A line of the table."""
        resident, swapped = (statistics.mean(column) / MB for column in zip(*self.memory(), strict=True))
        zram = swapped * self.stored() if swapped else 0.0
        cell = "" if cell_s is None else f"{cell_s:.2f} s"
        return f"| {name} | {resident:.1f} | {swapped:.1f} | {zram:.1f} | {resident + zram:.1f} | {cell} |"

    def wait_compressed(self) -> None:
        """Waits until every slot has been compressed."""
        self.compress("5s")
        deadline = time.monotonic() + PATIENCE_S
        while not all(swapped > resident for resident, swapped in self.memory()):
            if time.monotonic() > deadline:
                raise SystemExit(f"not compressed after {PATIENCE_S} s: {self.memory()}")
            time.sleep(1)
        self.compress("never")


def timed(action: Callable[[], Any]) -> float:
    """How long something took, in seconds."""
    began_s = time.monotonic()
    action()
    return time.monotonic() - began_s


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--algorithm", default="lz4", metavar="NAME", help="of zram; default: lz4")
    options = parser.parse_args()
    packages = product.build(say)
    with Host.up(name=f"zram-{os.getpid()}", driver="vm") as host:
        product.install(host, packages, SETTINGS)
        rest = Rest(host, options.algorithm)
        for number in range(options.slots):
            rest.claim()
            say(f"slot {number + 1} of {options.slots}")
        rest.cells()
        rows = [rest.row("awake", rest.cells())]
        rest.wait_compressed()
        rows.append(rest.row("at rest", None))
        rows.append(rest.row("… after a cell", rest.cells()))
        rows.append(rest.row("… after another", rest.cells()))
        said = rest.run("journalctl -t nbagent -o cat | grep -o 'compressed in [0-9]* ms' | cut -d' ' -f3").split()
    took_ms = statistics.median(map(int, said))
    print(f"{options.slots} slots, {options.algorithm}; one is compressed in {took_ms:.0f} ms\n")
    print("| a slot, MB | resident | swapped out | taken by that in zram | together | a cell takes |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
