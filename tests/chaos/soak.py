#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make soak`: thousands of claims and releases leave the services as they were; idle connections delay no claim.

    tests/chaos/soak.py [--claims 3000] [--callers 4] [--idle 1000] [--crowd 200] [--crowd-minutes 0] [--name HOST]
        [--keep]

Memory (RSS), descriptors and tasks of each service, and files, mounts, cgroups and units of the host are compared after
the first claims and after the last. With `--crowd-minutes`, `--crowd` callers claim and release at the same time for so
long, more than the host can serve at once: each claim is answered in time by a slot or a 503, and gets a slot in the
end. The figures go to standard output and to $NBAGENT_CACHE/chaos.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import hosts
from at_rest import REST_S, differences, summary
from inside_host import Inside
from people import Book, Caller

import product
from product import Api, say
from testhost_driver import Host

NAME = "soak"
# Until the first comparison; Python's and the kernel's caches fill.
FIRST_CLAIMS = 300
# A tenth, and what one more zygote's or claim's objects take.
GROWTH_MAX_KIB = 4096
# asyncio's default executor in the supervisor keeps up to four threads more than there are processors.
GROWTH = {("nbagent", "tasks"): 4 + (os.cpu_count() or 1)}
# After the crowd: the API's two workers keep the threads that were needed at the same time, up to api.threads each, and
# 0.1 MiB for each.
CROWD_GROWTH = {("nbagent-api", "tasks"): 2 * 64, ("nbagent-api", "rss_kib"): 16 << 10}


def rest(host: Host, inside: Inside) -> None:
    """Waits until no slot is claimed and the host is at rest."""
    api, until_s = Api(host), time.monotonic() + REST_S
    while found := differences(api.get("/slots").json(), inside.census, set()):
        if time.monotonic() > until_s:
            raise SystemExit(f"not at rest: {found}")
        time.sleep(0.5)


def claims(host: Host, book: Book, count: int, callers: int) -> None:
    """Claims and releases, `callers` at a time."""
    def one(number: int) -> None:
        caller = Caller(host, book)
        claim = caller.claim(**({"memory": "300M"} if number % 5 == 0 else {}))
        if claim:
            caller.release(claim["slot"])

    with ThreadPoolExecutor(callers) as threads:
        list(threads.map(one, range(count)))


def crowd(host: Host, book: Book, callers: int, minutes: float) -> dict[str, Any]:
    """Many callers at the same time. Returns the figures of their claims."""
    began_s, skip, refused = time.monotonic(), len(book.claim_s), book.refusals.copy()

    def one(_: int) -> int:
        caller, count = Caller(host, book), 0
        while time.monotonic() < began_s + 60 * minutes:
            claim = caller.claim()
            if claim:
                caller.release(claim["slot"])
                count += 1
        return count

    with ThreadPoolExecutor(callers) as threads:
        each = list(threads.map(one, range(callers)))
    return {
        "callers": callers, "took_s": round(time.monotonic() - began_s), "claims": sum(each),
        "claims_of_a_caller": [min(each), max(each)], "claim_s": summary(book.claim_s[skip:]),
        "refusals": dict(book.refusals - refused),
    }


def grown(
    before: dict[str, Any], after: dict[str, Any], more: Mapping[tuple[str, str], int] = GROWTH
) -> dict[str, tuple[int, int]]:
    """The figures that are larger than a run may leave them; `more` has the bounds of some."""
    found = {}
    for part, figures in before.items():
        for name, value in figures.items():
            now = after[part][name]
            allowed = more.get((part, name), GROWTH_MAX_KIB if name.endswith("_kib") else 2)
            if now > value + allowed:
                found[f"{part} {name}"] = (value, now)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--claims", type=int, default=3000)
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--crowd", type=int, default=200)
    parser.add_argument("--crowd-minutes", type=float, default=0)
    parser.add_argument("--name", default=NAME, help="of the test host")
    parser.add_argument("--keep", action="store_true", help="leave the host up, and use one that is up")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with hosts.running(options.name, keep=options.keep) as host:
        result = measure(host, options)
    out = product.CACHE / "chaos"
    out.mkdir(parents=True, exist_ok=True)
    (out / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if result["problems"]:
        raise SystemExit(f"{len(result['problems'])} problems")


def measure(host: Host, options: argparse.Namespace) -> dict[str, Any]:
    book = Book()
    with Inside(host) as inside:
        rest(host, inside)
        claims(host, book, FIRST_CLAIMS, options.callers)
        rest(host, inside)
        before = inside.load()
        began_s, skip = time.monotonic(), len(book.claim_s)
        claims(host, book, options.claims, options.callers)
        took_s = time.monotonic() - began_s
        without = book.claim_s[skip:]
        rest(host, inside)
        after = inside.load()
        say(f"{options.claims} claims in {took_s:.0f} s; {summary(without)}")
        skip = len(book.claim_s)
        with contextlib.ExitStack() as stack:
            for number in range(options.idle):
                stack.enter_context(host.connect((9000, 8000)[number % 2]))
            claims(host, book, 100, options.callers)
            beside = inside.load()
        time.sleep(2)
        claims(host, book, 10, 1)
        rest(host, inside)
        last = inside.load()
        many = {}
        if options.crowd_minutes:
            many = crowd(host, book, options.crowd, options.crowd_minutes)
            say(f"{options.crowd} callers: {many}")
            rest(host, inside)
            many["after"] = inside.load()
    larger = grown(before, after)
    larger |= {f"{name}, after idle connections": both for name, both in grown(after, last).items()}
    if many:
        larger |= {f"{name}, after the crowd": both for name, both in grown(last, many["after"], CROWD_GROWTH).items()}
    for name, (was, now) in larger.items():
        book.problem(f"{name} was {was} and is {now}")
    return {
        "claims": options.claims, "took_s": round(took_s), "claim_s": summary(without),
        "claim_s_beside_idle_connections": summary(book.claim_s[skip:]), "refusals": dict(book.refusals),
        "before": before, "after": after, "beside_idle_connections": beside, "after_idle_connections": last,
        "crowd": many,
        "problems": book.problems,
    }


if __name__ == "__main__":
    main()
