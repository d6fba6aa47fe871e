#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make bench-fleet`: the cost of a gateway and its distribution of claims, with the real HAProxy and configuration.

    tests/bench/fleet.py [--quick] [--only PART,PART…] [--out DIRECTORY]

Parts: `latency`, `rate` and `killed` on three real hosts and a gateway, installed by their packages on nspawn hosts;
`unequal`, `killed-agents`, `thousand` and `websockets` on stand-ins for hosts (agents.py, echo.py), because these
parts measure HAProxy alone. All traffic is on loopback and in network namespaces of this run. The tables go to
standard output; fleet.txt, fleet.md, fleet.png and fleet.json go to DIRECTORY (default: $NBAGENT_CACHE/bench). Takes
six minutes, with --quick two.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# tests/ first, because it has another fleet.py.
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent.parent)]

import fleetchart
import realfleet
import sides
import standin
from fleetreport import report
from gateway import Processes

from product import say
from testhost_driver import netns

REAL = ("latency", "rate", "killed")
STAND_IN = ("unequal", "killed-agents", "thousand", "websockets")


def parts(quick: bool) -> dict[str, Callable[..., dict[str, Any]]]:
    """All parts by name; those of REAL take the fleet, and the others a starter of programs."""
    return {
        "latency": lambda real: real.latency(*((200, 20) if quick else (2000, 100))),
        "rate": lambda real: real.rate(*((4, 1) if quick else (10, 3))),
        "killed": lambda real: real.killed(45 if quick else 150),
        "unequal": standin.unequal,
        "killed-agents": lambda processes: standin.killed(processes, 1000),
        "thousand": lambda processes: standin.thousand(
            processes, *((200, 400, 40.0) if quick else (1000, 3000, 100.0))
        ),
        "websockets": lambda processes: standin.websockets(processes, 400 if quick else 4000),
    }


def measure(names: list[str], quick: bool) -> dict[str, Any]:
    """Runs the named parts; each result has the load average before and after."""
    found: dict[str, Any] = {}
    made = parts(quick)

    def do(name: str, on: Any) -> None:
        say(f"part {name}")
        load = [os.getloadavg()[0]]
        began_s = time.monotonic()
        found[name] = made[name](on)
        load.append(os.getloadavg()[0])
        found[name] |= {"load": load, "took_s": time.monotonic() - began_s}

    for name in STAND_IN:
        if name in names:
            # Each has a network namespace of its own, because addresses and ports are the same in all.
            network = f"{name[:8]}-{os.getpid()}"
            netns.create(network)
            try:
                with Processes() as processes:
                    realfleet.netns_call(network, lambda name=name, mine=processes: do(name, mine))
            finally:
                netns.remove(network)
    if any(name in names for name in REAL):
        with realfleet.RealFleet() as real:
            for name in REAL:
                if name in names:
                    do(name, real)
    return found


def about(took_s: float) -> str:
    """The conditions of the run, for the reader."""
    version = subprocess.run(["/usr/sbin/haproxy", "-v"], capture_output=True, text=True, check=True).stdout.split()[2]
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC; HAProxy {version}, {os.cpu_count()} processors for "
        f"hosts, gateway and clients together, {memory_gib:.0f} GiB, Linux {platform.release()}; in {took_s:.0f} s"
    )


def failures(found: dict[str, Any]) -> list[str]:
    """Failures that make the run fail."""
    said = []
    for name in ("killed", "killed-agents", "unequal"):
        if count := found.get(name, {}).get("failed"):
            said.append(f"{name}: {count} claims failed")
    for name, rate in found.get("rate", {}).items():
        if isinstance(rate, dict) and rate["failed"]:
            said.append(f"rate, {name}: {rate['failed']} claims failed")
    sockets = found.get("websockets")
    if sockets and (sockets["error_count"] or sockets["open_at_the_end"] != sockets["wanted"]):
        said.append(f"websockets: {sockets['open_at_the_end']} of {sockets['wanted']} open; {sockets['errors'][:2]}")
    return said


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer of everything")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="PART,…", default=[*STAND_IN, *REAL])
    parser.add_argument("--out", type=Path, default=sides.OUT, help="where the files go")
    options = parser.parse_args(argv)
    if unknown := set(options.only) - {*STAND_IN, *REAL}:
        parser.error(f"no part {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    """Measures, prints, writes; status 1 when a claim or a websocket failed."""
    options = parse()
    # SIGTERM raises SystemExit, so that hosts and programs are still removed.
    # A websocket takes a descriptor here, one in the stand-in, and two in HAProxy.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    began_s = time.monotonic()
    found = measure(options.only, options.quick)
    found["about"] = about(time.monotonic() - began_s)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "fleet.json").write_text(json.dumps(found, indent=1) + "\n")
    text, marked = report(found)
    (options.out / "fleet.txt").write_text(text)
    (options.out / "fleet.md").write_text(marked)
    fleetchart.draw(options.out / "fleet.png", found)
    print(text)
    say(f"written: {options.out}/fleet.txt, fleet.md, fleet.png and fleet.json")
    if failed := failures(found):
        raise SystemExit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
