#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make exhausted`: while a resource of a host is used up, claims get a slot or a clear 503, and alarms name the cause.

    tests/chaos/exhausted.py [--only NAME] [--machine vm] [--name HOST] [--keep]

For each resource: nothing of it is left for a while, in which more claims arrive than there are warm slots, and the
journal, /metrics and `nbagent doctor` have to name it. Afterwards all claims get slots without the restart of a
service, and a user who had a notebook before goes on. The figures go to standard output and to $NBAGENT_CACHE/chaos.
The host has a /var of its own, with the journal in it. Open files are those of the whole machine, and are used up only
with `--machine vm`, which is Debian 13.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import hosts
from at_rest import REST_S, WARM, differences
from inside_host import Act, Inside, fault, shell
from people import DEADLINE_S, Book, Caller
from plan import API, LAUNCH, NETWORK, ROUTER, SUPERVISOR, UNITS

import product
from notebook import Kernel, Notebook
from product import Api, say
from testhost_driver import Host

NAME = "exhausted"
SLOTS = "nbagent-slots.slice"
CLAIMS = WARM + 2
# A resource is read every five seconds, a part is tried every two and is in the journal after ten.
ALARM_S = 20.0
RESET = "connection reset"
# Jupyter pings websockets every 30 s.
PONG_S = 30.0


class Exhausted(NamedTuple):
    """A resource, the commands that use it up and free it, and expressions that the alarms match; "" without an alarm.

    `options` are those of the claims. `serves`: claims get slots and no 503. `connects`: the host accepts connections;
    otherwise claims and a user's new websocket can also be reset. `machine` is the only driver of hosts on which it can
    be used up.
    """

    name: str
    begin: Act
    end: Act
    journal: str
    metric: str
    doctor: str
    options: Mapping[str, str] = MappingProxyType({})
    serves: bool = False
    connects: bool = True
    machine: str = ""


def nearly(resource: str) -> str:
    """The entry in the journal."""
    return f"{resource} of this host are nearly used up"


def left(resource: str) -> str:
    """The sample with less than 5 %."""
    return rf'nbagent_resource_free_percent\{{resource="{resource}"\}} [0-4]\.'


FAILURES = r"nbagent_pool_failures\{[^}]*\} [1-9]"


# The file system of the host's /var. It is a tmpfs, whose size and inodes can be lowered to what is used.
OWN_VAR = shell("""
    set -e
    mountpoint -q /var && exit
    mkdir /root/var && mount -t tmpfs -o size=2g,mode=755 var /root/var
    cp -a /var/. /root/var/ && mount --bind /root/var /var && umount /root/var
    printf '[Journal]\nStorage=persistent\n' > /etc/systemd/journald.conf.d/zz-own-var.conf
    systemctl restart systemd-journald && journalctl --flush
""")

CASES = (
    Exhausted(
        "blocks of /run", fault("full", "blocks of /run"), ("end", "full"),
        f"{nearly('blocks of /run/nbagent')}|records fails",
        r'nbagent_part_works\{part="records"\} 0', r"^fail +(supervisor|room in /run/nbagent):.*",
    ),
    Exhausted(
        "inodes of /run", fault("full", "inodes of /run"), ("end", "full"),
        f"{nearly('inodes of /run/nbagent')}|records fails",
        r'nbagent_part_works\{part="records"\} 0', r"^fail +(supervisor|room in /run/nbagent):.*",
    ),
    # doctor cannot start either.
    Exhausted(
        "process ids", fault("ids", "process ids"), ("end", "ids"), f"{nearly('processes and threads')}|did not start",
        f"{left('processes and threads')}|{FAILURES}", "",
    ),
    Exhausted(
        "tasks of slots", shell(
            f"systemctl set-property --runtime {SLOTS} TasksMax=$(systemctl show -P TasksCurrent {SLOTS})"
        ), shell(
            f"systemctl set-property --runtime {SLOTS} TasksMax=infinity; systemctl revert {SLOTS}"
        ),
        r"did not start", FAILURES, r"^fail +(start of a slot|supervisor):.*",
    ),
    Exhausted(
        "descriptors of the supervisor", fault("descriptors", SUPERVISOR), ("end", "descriptors"),
        f"{nearly('descriptors of the supervisor')}|did not start: .*Too many open files",
        f"{left('descriptors of the supervisor')}|{FAILURES}", r"^fail +(supervisor|start of a slot):.*",
    ),
    Exhausted(
        "blocks of /var, and the journal", fault("full", "blocks of /var"), ("end", "full"),
        "blocks of /var/log of this host ", left("blocks of /var/log"), r"^(warn|fail) +room in /var/log:.*",
        serves=True,
    ),
    Exhausted(
        "inodes of /var", fault("full", "inodes of /var"), ("end", "full"),
        nearly("inodes of /var/log"), left("inodes of /var/log"), r"^fail +room in /var/log:.*", serves=True,
    ),
    Exhausted(
        "nftables", fault("nftables", NETWORK), ("end", "nftables"), "network fails.*No buffer space available",
        r'nbagent_part_works\{part="network"\} 0', r"^fail +supervisor:.*No buffer space available",
        {"network": "internet"},
    ),
    Exhausted("dbus-daemon", fault("connections", "dbus-daemon"), ("end", "connections"), "", "", "", serves=True),
    # The units service keeps the connection that it has.
    Exhausted("connections of PID 1", fault("connections", "PID 1"), ("end", "connections"), "", "", "", serves=True),
    Exhausted(
        "open files", fault("open files", "open files"), ("end", "open files"), nearly("open files"), "",
        r"^(warn|fail) +use:.*nearly all open files", connects=False, machine="vm",
    ),
)


def matching(name: str, expression: str, text: str) -> dict[str, str]:
    """The first line that matches, by the name."""
    lines = [line for line in text.splitlines() if re.search(expression, line)]
    return {name: lines[0][:160]} if lines else {}


class Run:
    """One run."""

    def __init__(self, host: Host, inside: Inside) -> None:
        self.slower = hosts.slower(host)
        self.book = Book(deadline_s=DEADLINE_S * self.slower)
        self.host, self.inside, self.api = host, inside, Api(host, timeout=self.book.deadline_s + 30)
        self.results: dict[str, Any] = {}

    def rest(self, held: set[str]) -> float:
        began_s = time.monotonic()
        while found := differences(self.api.get("/slots").json(), self.inside.census, held):
            if time.monotonic() > began_s + REST_S * self.slower:
                raise SystemExit(f"not at rest: {found}")
            time.sleep(0.5)
        return time.monotonic() - began_s

    def services(self) -> str:
        units = (SUPERVISOR, API, ROUTER, UNITS, LAUNCH, NETWORK)
        return self.host.run(["systemctl", "show", "-P", "InvocationID", *units]).stdout

    def claim(self, case: Exhausted) -> tuple[str, str, float]:
        """The kind of the answer, the slot if there is one, and the time."""
        began_s = time.monotonic()
        try:
            answer = self.api.post("/claim", dict(case.options))
        except (ConnectionResetError, ConnectionRefusedError):
            if case.connects:
                raise
            return RESET, "", time.monotonic() - began_s
        took_s = time.monotonic() - began_s
        if answer.status == 200:
            return "a slot", answer.json()["slot"], took_s
        document = answer.json()
        return f"{answer.status} {document['type'].rpartition(':')[2]}: {document['detail']}", "", took_s

    def run_cell(self, case: Exhausted, user: Kernel) -> None:
        if user.run("x + 1").text != "42":
            self.book.problem(f"{case.name}: the cell of a user failed")

    def alarms(self, case: Exhausted, since: str) -> dict[str, str]:
        """The first entry, sample and finding that name the resource."""
        found: dict[str, str] = {}
        until_s = time.monotonic() + ALARM_S * self.slower
        while time.monotonic() < until_s and len(found) < sum(map(bool, (case.journal, case.metric, case.doctor))):
            found |= self.entries(case, since)
            if case.metric and "metric" not in found:
                found |= matching("metric", case.metric, self.api.get("/metrics").body.decode())
            if case.doctor and "doctor" not in found:
                doctor = self.host.run(["nbagent", "doctor"], check=False)
                found |= matching("doctor", case.doctor, doctor.stdout)
            time.sleep(1)
        return found

    def entries(self, case: Exhausted, since: str) -> dict[str, str]:
        """The first entry that names the resource."""
        command = ["journalctl", "-q", "--no-pager", "-o", "cat", "-u", "nbagent", "--after-cursor", since]
        found = self.host.run(command, check=False) if case.journal else None
        return matching("journal", case.journal, found.stdout) if found else {}

    def try_one(self, case: Exhausted, notebook: Notebook, kernel_id: str) -> None:
        services, problems = self.services(), len(self.book.problems)
        since = hosts.journal_cursor(self.host)
        with contextlib.ExitStack() as stack:
            # A new websocket, because Jupyter closes one whose client sends no pong for 90 s. It is open when the
            # kernel has responded.
            user = stack.enter_context(Kernel(notebook, kernel_id))
            threads = stack.enter_context(ThreadPoolExecutor(CLAIMS))
            self.run_cell(case, user)
            began_s = time.monotonic()
            self.inside.act(case.begin)
            if time.monotonic() - began_s > PONG_S:
                user = stack.enter_context(Kernel(notebook, kernel_id))
            try:
                answers = list(threads.map(self.claim, [case] * CLAIMS))
                self.run_cell(case, user)
                if case.connects:
                    with Kernel(notebook, kernel_id) as again:
                        self.run_cell(case, again)
                found = self.alarms(case, since)
            finally:
                self.inside.act(case.end)
            ended_s = time.monotonic()
            found |= self.entries(case, since)
            right = ("a slot",) if case.serves else ("a slot", "503 ") if case.connects else ("a slot", "503 ", RESET)
            for kind, _, took_s in answers:
                if not kind.startswith(right) or took_s > self.book.deadline_s:
                    self.book.problem(f"{case.name}: a claim got {kind} after {took_s:.1f} s")
            wanted = {"journal": case.journal, "metric": case.metric, "doctor": case.doctor}
            for name in {name for name, expression in wanted.items() if expression} - found.keys():
                self.book.problem(f"{case.name}: not in {name}")
            caller = Caller(self.host, self.book)
            for _, slot, _ in answers:
                if slot:
                    caller.release(slot)
            claims = list(threads.map(lambda _: caller.claim(), range(CLAIMS)))
            recovered_s = time.monotonic() - ended_s
            for claim in claims:
                if claim:
                    caller.release(str(claim["slot"]))
        rest_s = self.rest({notebook.slot})
        if self.services() != services:
            self.book.problem(f"{case.name}: a service was restarted")
        self.results[case.name] = {
            "answers": Counter(kind for kind, _, _ in answers),
            "longest_s": round(max(took_s for *_, took_s in answers), 2),
            "alarms": found, "recovered_s": round(recovered_s, 2), "rest_s": round(rest_s, 2),
        }
        say(f"{case.name}: {json.dumps(self.results[case.name], indent=1)}")
        for text in self.book.problems[problems:]:
            say(f"    PROBLEM {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = [case.name for case in CASES]
    parser.add_argument("--only", action="append", choices=names, help="a resource")
    parser.add_argument("--machine", choices=("nspawn", "vm"), default="nspawn")
    parser.add_argument("--name", default=NAME, help="of the test host")
    parser.add_argument("--keep", action="store_true", help="leave the host up, and use one that is up")
    options = parser.parse_args()
    options.only = options.only or names
    suite = "trixie" if options.machine == "vm" else "bookworm"
    cases = [case for case in CASES if case.machine in ("", options.machine) and case.name in options.only]
    running = hosts.running(
        options.name, keep=options.keep, driver=options.machine, suite=suite,
        prepare=OWN_VAR if any("/var" in case.name for case in cases) else (),
    )
    with running as host, Inside(host) as inside:
        run = Run(host, inside)
        run.rest(set())
        notebook = Notebook(host, Api(host).post("/claim").json())
        kernel = notebook.kernel()
        kernel.run("x = 41")
        for case in cases:
            run.try_one(case, notebook, kernel.id)
        Caller(host, run.book).release(notebook.slot)
    result = {"resources": run.results, "problems": run.book.problems}
    out = product.CACHE / "chaos"
    out.mkdir(parents=True, exist_ok=True)
    (out / "exhausted.json").write_text(json.dumps(result, indent=1) + "\n")
    if run.book.problems:
        raise SystemExit("\n".join((f"{len(run.book.problems)} problems", *run.book.problems)))


if __name__ == "__main__":
    main()
