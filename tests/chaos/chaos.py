#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make chaos`: random faults on a real host under users and claims, by a seed that is printed.

    tests/chaos/chaos.py [--faults N] [--first N] [--seed N] [--users N] [--claimers N] [--machine vm] [--only KIND]
        [--name HOST] [--keep]

plan.py has the kinds of faults; --only has one of them, and may be repeated. `--machine vm` is an emulated machine with
Debian 13 and cgroup v2, whose clock is stepped too. It is slow, so a run has fewer faults, users and callers there;
with --first the next run begins with the fault that follows those of the former one. --keep leaves the host up, and
uses one that is up, on which it first releases the slots of a run that was interrupted. After each fault more slots
than the warm pool has are claimed; the time until all are there is the recovery. After every ten, and at the end, the
host has to come to rest with nothing lost, doubled or left behind: slots, records, scopes, cgroups, processes, mounts,
namespaces, interfaces, user ids, descriptors. The figures go to standard output and to $NBAGENT_CACHE/chaos. The exit
status is 1 after a problem.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import hosts
import plan
from at_rest import REST_S, WARM, differences, summary
from inside_host import Inside
from people import DEADLINE_S, Book, Caller, Claimer, User

import product
from product import Api, say
from testhost_driver import Host

NAME = "chaos"
CENSUS_EVERY = 10


class Chaos:
    """One run."""

    def __init__(self, host: Host, inside: Inside, options: argparse.Namespace) -> None:
        self.host, self.inside, self.options = host, inside, options
        self.api, self.stop = Api(host, timeout=60), threading.Event()
        self.slower = hosts.slower(host)
        self.book = Book(deadline_s=DEADLINE_S * self.slower)
        self.caller = Caller(host, self.book)
        self.closings = 0
        self.recoveries: list[tuple[plan.Fault, float, float]] = []
        # Faults that no process could be given, as one without CAP_SYS_RESOURCE cannot limit a zygote service.
        self.missed: list[plan.Fault] = []
        self.users = [
            User(host, self.book, number, self.stop, lambda: self.closings, 1.0) for number in range(options.users)
        ]
        self.claimers = [
            Claimer(host, self.book, number, self.stop, options.seed, 2.0) for number in range(options.claimers)
        ]
        self.pids: dict[str, Any] = {}
        # Times at which any call of a service may have failed, which is an unexpected error.
        self.excused: list[tuple[float, float]] = []

    def run(self) -> None:
        since = hosts.journal_cursor(self.host)
        self.rest("before the first fault", set())
        chosen = [kind for kind in self.kinds() if not self.options.only or kind.name in self.options.only]
        before = self.inside.census()
        for user in self.users:
            user.start()
        for user in self.users:
            user.ready.wait(120)
        self.pids = {name: record["pid"] for name, record in self.inside.census()["records"].items() if record}
        for claimer in self.claimers:
            claimer.start()
        with ThreadPoolExecutor(WARM + 1) as threads:
            first, last = self.options.first, self.options.first + self.options.faults - 1
            for fault in plan.faults(self.options.seed, last, chosen)[first - 1:]:
                self.inflict(fault, threads)
                if fault.number % CENSUS_EVERY == 0 or fault.number == last:
                    self.pause(lambda fault=fault: self.rest(f"after fault {fault.number}", self.held()))
        self.stop.set()
        for thread in (*self.claimers, *self.users):
            thread.join(300)
        self.check_users()
        for user in self.users:
            if user.claimed:
                self.caller.release(user.slot)
        self.rest("at the end", set())
        self.compare(before, self.inside.census())
        self.check_descriptors()
        self.check_journal(since)

    def kinds(self) -> tuple[plan.Kind, ...]:
        """The kinds of faults of this host."""
        return (*plan.KINDS, *plan.OF_A_MACHINE) if self.host.driver == "vm" else plan.KINDS

    def inflict(self, fault: plan.Fault, threads: ThreadPoolExecutor) -> None:
        time.sleep(fault.pause_s)
        began_s = time.monotonic()
        try:
            # Before and after it, because a user notices it meanwhile, and may open a websocket meanwhile.
            self.closings += fault.closes_websockets
            hit = self.inside.begin(fault)
            self.closings += fault.closes_websockets
            if fault.held_s:
                time.sleep(fault.held_s)
                self.inside.end(fault)
        except RuntimeError as error:
            self.book.problem(f"fault {fault} was not done: {error}")
            return
        if hit is None or hit == []:
            self.missed.append(fault)
            say(f"{fault}: nothing was hit")
            return
        ended_s = time.monotonic()
        if fault.kind in plan.ANYWHERE:
            self.excused.append((time.time() - (ended_s - began_s) - 1, time.time() + 3))
        claims = list(threads.map(lambda _: self.caller.claim(), range(WARM + 1)))
        recovered_s = time.monotonic() - ended_s
        self.recoveries.append((fault, recovered_s, time.monotonic() - began_s))
        threads_release = [threads.submit(self.caller.release, claim["slot"]) for claim in claims if claim]
        for released in threads_release:
            released.result()
        problems = len(self.book.problems)
        say(f"{fault}: {recovered_s:.2f} s, {problems} problems; hit {str(hit)[:60].strip()}")
        for text in self.book.problems[self.told:]:
            say(f"    PROBLEM {text}")
        self.told = problems

    told = 0

    def held(self) -> set[str]:
        return {user.slot for user in self.users if user.claimed}

    def pause(self, act: Callable[[], None]) -> None:
        """Does something while no claimer has a slot."""
        for claimer in self.claimers:
            claimer.turn.acquire()
        try:
            act()
        finally:
            for claimer in self.claimers:
                claimer.turn.release()

    def rest(self, when: str, held: set[str]) -> None:
        """Waits until the host is at rest with exactly these slots claimed; the differences are a problem."""
        until_s, found = time.monotonic() + REST_S * self.slower, ["not looked at"]
        while found and time.monotonic() < until_s:
            time.sleep(0.5)
            try:
                slots = self.api.get("/slots").json()
            except (OSError, ValueError) as error:
                found = [str(error)]
                continue
            found = differences(slots, self.inside.census, held)
        if found:
            self.book.problem(f"{when} not at rest in {REST_S:g} s: {'; '.join(found)}")

    def check_users(self) -> None:
        """The first process of each user's slot is the same, and the user was served to the end."""
        census = self.inside.census()
        for user in self.users:
            record = census["records"].get(user.slot)
            if record is None or record["state"] != "claimed" or record["pid"] != self.pids.get(user.slot):
                self.book.problem(f"the slot {user.slot} of {user.name} is lost: {record}")

    def compare(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Fails when the host has more or less than before the first user."""
        for name in ("mounts", "netns", "files", "half", "failed"):
            if before[name] != after[name]:
                self.book.problem(f"{name} were {before[name]} and are {after[name]}")
        # Services that start at a request can have ended.
        more = {kind: count for kind, count in after["namespaces"].items() if count > before["namespaces"][kind]}
        if more:
            self.book.problem(f"namespaces were {before['namespaces']}, and more are {more}")

    def check_descriptors(self) -> None:
        """A supervisor that has run through faults has no more descriptors than a new one with the same slots."""
        old = self.inside.census()["supervisor"]
        self.host.run(["systemctl", "restart", plan.SUPERVISOR])
        self.rest("after the last restart", set())
        new = self.inside.census()["supervisor"]
        more = {kind: (new.get(kind, 0), count) for kind, count in old.items() if count > new.get(kind, 0) + 2}
        if more:
            self.book.problem(f"descriptors of a new and of the old supervisor: {more}")

    def check_journal(self, since: str) -> None:
        """No service has reported an error that it does not expect."""
        grep = ["--grep", "Traceback|unexpected error|never retrieved"]
        command = ["journalctl", "--no-pager", "-q", "-o", "short-unix", "--after-cursor", since, *grep]
        found = self.host.run(command, check=False)
        ours = [
            line for line in found.stdout.splitlines() if ("nbagent" in line or "gunicorn" in line)
            and not any(began_s <= float(line.split()[0]) <= ended_s for began_s, ended_s in self.excused)
        ]
        if ours:
            self.book.problem(f"{len(ours)} errors in the journal, the first: {ours[0][:300]}")


def report(run: Chaos, took_s: float) -> dict[str, Any]:
    """The figures of a run."""
    recoveries = [recovered_s for _, recovered_s, _ in run.recoveries]
    kinds: dict[str, list[float]] = {}
    for fault, recovered_s, _ in run.recoveries:
        kinds.setdefault(f"{fault.kind} {fault.target}", []).append(recovered_s)
    book = run.book
    return {
        "seed": run.options.seed, "first": run.options.first, "faults": len(run.recoveries), "took_s": round(took_s),
        "missed": [str(fault) for fault in run.missed],
        "faults_by_kind": dict(Counter(fault.kind for fault, _, _ in run.recoveries)),
        "recovery_s": summary(recoveries),
        "recovery_s_by_kind": {name: summary(values) for name, values in sorted(kinds.items())},
        "claims": len(book.claim_s), "claim_s": summary(book.claim_s), "refusals": dict(book.refusals),
        "cells": book.counts["cells"], "cell_s": summary(book.cell_s),
        "websockets_opened_again": book.counts["websockets opened again"],
        "releases": book.counts["releases"], "slots": len(book.owners), "problems": book.problems,
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--faults", type=int, help="how many; 200, on an emulated machine 23")
    parser.add_argument("--first", type=int, default=1, help="the number of the first")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--users", type=int, help="6, on an emulated machine 2")
    parser.add_argument("--claimers", type=int, help="2, on an emulated machine 1")
    parser.add_argument("--machine", choices=("nspawn", "vm"), default="nspawn")
    parser.add_argument("--only", action="append", metavar="KIND", help="a kind of fault")
    parser.add_argument("--name", help="of the test host")
    parser.add_argument("--keep", action="store_true", help="leave the host up, and use one that is up")
    options = parser.parse_args(argv)
    for name, native, emulated in (("faults", 200, 23), ("users", 6, 2), ("claimers", 2, 1)):
        if getattr(options, name) is None:
            setattr(options, name, emulated if options.machine == "vm" else native)
    return options


def main() -> None:
    options = parse()
    say(f"seed {options.seed}: CHAOS=\"--faults {options.faults} --first {options.first} --seed {options.seed}\"")
    suite = "trixie" if options.machine == "vm" else "bookworm"
    name = options.name or (NAME if options.machine == "nspawn" else f"{NAME}-vm")
    with hosts.running(name, keep=options.keep, driver=options.machine, suite=suite) as host:
        host.run(["systemctl", "restart", plan.SUPERVISOR])
        product.wait_warm(host, WARM)
        began_s = time.monotonic()
        with Inside(host) as inside:
            run = Chaos(host, inside, options)
            run.run()
        found = report(run, time.monotonic() - began_s)
    out = product.CACHE / "chaos"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"chaos-{options.seed}-{options.first}.json").write_text(json.dumps(found, indent=1) + "\n")
    by_kind = found.pop("recovery_s_by_kind")
    print(json.dumps(found, indent=1))
    print("recovery in seconds by kind, the slowest first")
    for name, figures in sorted(by_kind.items(), key=lambda item: -item[1]["p99"]):
        print(f"{figures['p50']:8.2f} p50 {figures['p99']:8.2f} p99 {figures['count']:4}  {name}")
    if found["problems"]:
        raise SystemExit(f"{len(found['problems'])} problems")


if __name__ == "__main__":
    main()
