#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make test-upgrade`: changes of the software under users who run cells over one websocket each, and claims beside.

    tests/chaos/upgrade.py [--users 30] [--claimers 3] [--keep]

A newer version is installed by apt, then an older one, and the newer one again; between them the settings are edited
and all services reloaded, the image is replaced, PID 1 executes itself anew, and all services but the router are
restarted as needrestart does. No cell and no claim may fail, and no websocket may close. The figures go to standard
output and to $NBAGENT_CACHE/chaos.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import plan
from at_rest import SETTINGS, WARM, summary
from people import Book, Claimer, User

import product
from product import say
from testhost_driver import Host

NAME = "upgrade"
# From a change to the next one, in which users go on.
AFTER_S = 8.0
NEWER, OLDER = "+newer", "~older"


def repacked(packages: list[Path], suffix: str, into: Path) -> list[Path]:
    """The packages as of another version, with a changed router configuration and other default settings."""
    for package in packages:
        tree = into / f"{package.stem}{suffix}"
        subprocess.run(["dpkg-deb", "-R", package, tree], check=True)
        control = tree / "DEBIAN/control"
        version = re.search(r"^Version: (.+)$", control.read_text(), re.M)[1]
        control.write_text(control.read_text().replace(version, version + suffix))
        for file in tree.glob("usr/lib/python3/dist-packages/nbagent/__init__.py"):
            file.write_text(re.sub(r'"(\d[^"]*)"', rf'"\1{suffix}"', file.read_text(), count=1))
        for name in ("usr/lib/nbagent/router.conf", "etc/nbagent/nbagent.toml"):
            if (file := tree / name).exists():
                file.write_text(f"{file.read_text()}# {suffix}\n")
        build = ["dpkg-deb", "--root-owner-group", "-b", "-Znone", tree, into]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    return sorted(into.glob("*.deb"))


def changes(host: Host, newer: list[str], older: list[str]) -> dict[str, list[list[str]]]:
    """The commands of each change, by its name."""
    apt = ["apt-get", "-q", "install", "-y", "--allow-downgrades", "-o", "Dpkg::Options::=--force-confold"]
    services = [plan.SUPERVISOR, plan.API, plan.ROUTER]
    return {
        "a newer version": [[*apt, *newer]],
        "an edited conffile and a reload": [
            ["sed", "-i", "s/^#idle = .*/idle = \"2h\"/", "/etc/nbagent/nbagent.toml"],
            ["systemctl", "reload", *services],
        ],
        "a new image": [
            ["sh", "-c", "cd /root && mkdir -p etc && date > etc/layer && tar -cf layer.tar etc/layer"],
            ["nbagent", "image", "use", "--layer", "/root/layer.tar", "minimal", "minimal"],
        ],
        "an older version": [[*apt, *older]],
        "PID 1 executes itself": [["systemctl", "daemon-reexec"]],
        "the newer version again": [[*apt, *newer]],
        "needrestart": [["systemctl", "restart", plan.SUPERVISOR, plan.API, plan.UNITS, plan.LAUNCH, plan.JOURNAL]],
    }


class Upgrade:
    """One run."""

    def __init__(self, host: Host, options: argparse.Namespace) -> None:
        self.host, self.book, self.stop = host, Book(), threading.Event()
        self.users = [User(host, self.book, number, self.stop, lambda: 0, 1.0) for number in range(options.users)]
        self.claimers = [
            Claimer(host, self.book, number, self.stop, 1, 1.0) for number in range(options.claimers)
        ]
        self.took: dict[str, dict[str, Any]] = {}

    def run(self, steps: dict[str, list[list[str]]]) -> None:
        for user in self.users:
            user.start()
        for user in self.users:
            user.ready.wait(300)
        for claimer in self.claimers:
            claimer.start()
        time.sleep(AFTER_S)
        for name, commands in steps.items():
            claims, cells, began_s = len(self.book.claim_s), len(self.book.cell_s), time.monotonic()
            for command in commands:
                self.host.run(command, timeout=900)
            took_s = time.monotonic() - began_s
            time.sleep(AFTER_S)
            self.took[name] = {
                "took_s": round(took_s, 1), "claim_s": summary(self.book.claim_s[claims:]),
                "cell_s": summary(self.book.cell_s[cells:]), "refusals": dict(self.book.refusals),
                "problems": len(self.book.problems),
            }
            say(f"{name}: {self.took[name]}")
        self.stop.set()
        for thread in (*self.claimers, *self.users):
            thread.join(300)
        for user in self.users:
            if user.claimed:
                user.caller.release(user.slot)
        if self.book.refusals:
            self.book.problem(f"claims were refused: {dict(self.book.refusals)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--users", type=int, default=30)
    parser.add_argument("--claimers", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="leave the host up, and use one that is up")
    options = parser.parse_args()
    host = Host.up(name=NAME, say=say)
    if options.keep:
        host.keep()
    try:
        packages = product.build(say)
        host.run(["mkdir", "-p", "/etc/nbagent/conf.d"])
        host.run(["tee", "/etc/nbagent/conf.d/50-test.toml"], input=SETTINGS)
        product.add(host, packages)
        product.wait_warm(host, WARM)
        # Not the image, which has a version of its own.
        changed = [package for package in packages if "image" not in package.name]
        found = []
        with tempfile.TemporaryDirectory() as directory:
            for suffix in (NEWER, OLDER):
                into = Path(directory, suffix)
                into.mkdir()
                made = repacked(changed, suffix, into)
                host.copy_in([str(path) for path in made], "/root/")
                found.append([f"/root/{path.name}" for path in made])
        run = Upgrade(host, options)
        run.run(changes(host, *found))
    finally:
        if not options.keep:
            host.down(now=True)
    result = {
        "users": options.users, "claims": len(run.book.claim_s), "claim_s": summary(run.book.claim_s),
        "cells": run.book.counts["cells"], "cell_s": summary(run.book.cell_s), "steps": run.took,
        "websockets_opened_again": run.book.counts["websockets opened again"], "problems": run.book.problems,
    }
    out = product.CACHE / "chaos"
    out.mkdir(parents=True, exist_ok=True)
    (out / "upgrade.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if result["problems"]:
        raise SystemExit(f"{len(result['problems'])} problems")


if __name__ == "__main__":
    main()
