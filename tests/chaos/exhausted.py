#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make exhausted`: while a resource of a host is used up, claims get a slot or a clear 503, and alarms name the cause.

    tests/chaos/exhausted.py [--only NAME] [--keep]

For each resource: nothing of it is left for a while, in which more claims arrive than there are warm slots, and the
journal, /metrics and `nbagent doctor` have to name it. Afterwards all claims get slots without the restart of a
service, and a user who had a notebook before goes on. The figures go to standard output and to $NBAGENT_CACHE/chaos.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import hosts
from at_rest import REST_S, WARM, differences
from inside_host import Inside
from people import DEADLINE_S, Book, Caller
from plan import API, LAUNCH, NETWORK, ROUTER, SUPERVISOR, UNITS, Fault

import product
from notebook import Kernel, Notebook
from product import Api, say
from testhost_driver import Host

NAME = "exhausted"
SLOTS = "nbagent-slots.slice"
CLAIMS = WARM + 2
# A resource is read every five seconds, a part is tried every two and is in the journal after ten.
ALARM_S = 20.0


class Exhausted(NamedTuple):
    """A resource, the commands that use it up and free it, and expressions that the alarms match."""

    name: str
    begin: tuple[str, ...]
    end: tuple[str, ...]
    journal: str
    metric: str
    doctor: str


def shell(text: str) -> tuple[str, ...]:
    return ("sh", "-c", text)


def nearly(resource: str) -> str:
    """The entry in the journal."""
    return f"{resource} of this host are nearly used up"


def left(resource: str) -> str:
    """The sample with less than 5 %."""
    return rf'nbagent_resource_free_percent\{{resource="{resource}"\}} (-|[0-4]\.)'


FAILURES = r"nbagent_pool_failures\{[^}]*\} [1-9]"


def fault(kind: str, target: str) -> tuple[str, ...]:
    """A fault of inside.py."""
    return ("fault", kind, target)


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
)


def matching(name: str, expression: str, text: str) -> dict[str, str]:
    """The first line that matches, by the name."""
    lines = [line for line in text.splitlines() if re.search(expression, line)]
    return {name: lines[0][:160]} if lines else {}


class Run:
    """One run."""

    def __init__(self, host: Host, inside: Inside) -> None:
        self.host, self.inside, self.api = host, inside, Api(host, timeout=DEADLINE_S + 30)
        self.book = Book()
        self.results: dict[str, Any] = {}

    def act(self, words: tuple[str, ...]) -> None:
        if words[0] == "fault":
            self.inside.begin(Fault(0, words[1], words[2], 0.0, 1.0))
        elif words[0] == "end":
            self.inside.end(Fault(0, words[1], "", 0.0, 1.0))
        else:
            self.host.run(list(words))

    def rest(self, held: set[str]) -> float:
        began_s = time.monotonic()
        while found := differences(self.api.get("/slots").json(), self.inside.census(), held):
            if time.monotonic() > began_s + REST_S:
                raise SystemExit(f"not at rest: {found}")
            time.sleep(0.5)
        return time.monotonic() - began_s

    def services(self) -> str:
        units = (SUPERVISOR, API, ROUTER, UNITS, LAUNCH, NETWORK)
        return self.host.run(["systemctl", "show", "-P", "InvocationID", *units]).stdout

    def claim(self, number: int) -> tuple[str, str, float]:
        """The kind of the answer, the slot if there is one, and the time."""
        began_s = time.monotonic()
        answer = self.api.post("/claim")
        took_s = time.monotonic() - began_s
        if answer.status == 200:
            return "a slot", answer.json()["slot"], took_s
        document = answer.json()
        return f"{answer.status} {document['type'].rpartition(':')[2]}: {document['detail']}", "", took_s

    def alarms(self, case: Exhausted) -> dict[str, str]:
        """The first sample and finding that name the resource."""
        found: dict[str, str] = {}
        until_s = time.monotonic() + ALARM_S
        while time.monotonic() < until_s and len(found) < 1 + bool(case.doctor):
            if "metric" not in found:
                found |= matching("metric", case.metric, self.api.get("/metrics").body.decode())
            if case.doctor and "doctor" not in found:
                doctor = self.host.run(["nbagent", "doctor"], check=False)
                found |= matching("doctor", case.doctor, doctor.stdout)
            time.sleep(1)
        return found

    def entries(self, case: Exhausted, since: str) -> dict[str, str]:
        """The first entry that names the resource."""
        command = ["journalctl", "-q", "--no-pager", "-o", "cat", "-u", "nbagent", "--after-cursor", since]
        return matching("journal", case.journal, self.host.run(command).stdout)

    def try_one(self, case: Exhausted, notebook: Notebook, kernel_id: str) -> None:
        services, problems = self.services(), len(self.book.problems)
        cursor = self.host.run(["journalctl", "-q", "-n", "1", "--show-cursor", "-o", "cat"]).stdout
        since = cursor.rpartition("-- cursor: ")[2].strip()
        with ThreadPoolExecutor(CLAIMS) as threads:
            self.act(case.begin)
            try:
                answers = list(threads.map(self.claim, range(CLAIMS)))
                # By a new websocket, because Jupyter closes one whose client sends no pong for 90 s.
                with Kernel(notebook, kernel_id) as user:
                    if user.run("x + 1").text != "42":
                        self.book.problem(f"{case.name}: the cell of a user failed")
                found = self.alarms(case)
            finally:
                self.act(case.end)
            ended_s = time.monotonic()
            found |= self.entries(case, since)
            for kind, _, took_s in answers:
                if not kind.startswith(("a slot", "503 ")) or took_s > DEADLINE_S:
                    self.book.problem(f"{case.name}: a claim got {kind} after {took_s:.1f} s")
            for name in {"journal", "metric", *(["doctor"] if case.doctor else [])} - found.keys():
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
    parser.add_argument("--only", action="append", help="a resource")
    parser.add_argument("--name", default=NAME, help="of the test host")
    parser.add_argument("--keep", action="store_true", help="leave the host up, and use one that is up")
    options = parser.parse_args()
    with hosts.running(options.name, keep=options.keep) as host, Inside(host) as inside:
        run = Run(host, inside)
        run.rest(set())
        notebook = Notebook(host, Api(host).post("/claim").json())
        kernel = notebook.kernel()
        kernel.run("x = 41")
        for case in CASES:
            if not options.only or case.name in options.only:
                run.try_one(case, notebook, kernel.id)
    result = {"resources": run.results, "problems": run.book.problems}
    out = product.CACHE / "chaos"
    out.mkdir(parents=True, exist_ok=True)
    (out / "exhausted.json").write_text(json.dumps(result, indent=1) + "\n")
    if run.book.problems:
        raise SystemExit("\n".join((f"{len(run.book.problems)} problems", *run.book.problems)))


if __name__ == "__main__":
    main()
