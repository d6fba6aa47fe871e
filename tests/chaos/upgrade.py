#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make test-upgrade`: changes of the software under users who run cells over one websocket each, and claims beside.

    tests/chaos/upgrade.py [--users 30] [--claimers 3] [--name HOST] [--keep]

A newer version is installed by unattended-upgrades from a repository, then an older one by apt, and the newer one
again; between them the settings are edited and all services reloaded, the image is replaced, and PID 1 executes itself
anew. Then libraries of all services are replaced, as by an update of Debian, and needrestart restarts the services. No
cell and no claim may fail, and no websocket may close. At last the host is rebooted: all sessions end, their pages get
the reason, claims are refused until the host is up and then get slots, and nothing is left of the former slots. The
figures go to standard output and to $NBAGENT_CACHE/chaos.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import plan
from at_rest import REST_S, SETTINGS, WARM, differences, summary
from inside_host import Inside
from people import Book, Caller, Claimer, User

import product
from nbagent import __version__
from product import ROUTER_PORT, Api, say
from testhost_driver import Host

NAME = "upgrade"
# From a change to the next one, in which users go on.
AFTER_S = 8.0
NEWER, OLDER = "+newer", "~older"
SHUTDOWN = "its host shuts down"
REPOSITORY = "/srv/repo"
UNATTENDED = 'Unattended-Upgrade::Origins-Pattern:: "origin=nbagent";\n'
# Files that the services have mapped, with other inodes, as dpkg leaves them. It is checked that needrestart sees it.
REPLACED = """
for name in libcrypto.so.3 libffi.so.8 libz.so.1; do
    file=$(readlink -f /usr/lib/x86_64-linux-gnu/$name)
    cp -p $file $file.new
    mv $file.new $file
done
needrestart -b -r l | sort >/root/outdated
for service in nbagent nbagent-api nbagent-launch nbagent-router nbagent-units; do
    grep -qx "NEEDRESTART-SVC: $service.service" /root/outdated
done
"""
# The zygote went on, and is replaced by one with the new libraries. The router goes on until the operator restarts it.
GONE_ON = """
journalctl -q -u nbagent --grep 'zygote .* replaced: libraries of the host were replaced' | grep -q .
nbagent doctor >/root/doctor || :
grep '^warn *libraries of the router' /root/doctor
"""


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


def offer(host: Host, packages: list[Path], directory: Path) -> None:
    """Makes a signed repository of the packages on the host, and lets unattended-upgrades install from it."""
    build = [product.TOP / "packaging/build-repo", directory / "repo", f"file:{REPOSITORY}", *packages]
    subprocess.run(build, check=True)
    host.run(["mkdir", "-p", REPOSITORY])
    host.copy_in(list((directory / "repo").iterdir()), f"{REPOSITORY}/")
    host.run(["cp", f"{REPOSITORY}/nbagent.sources", "/etc/apt/sources.list.d/"])
    host.run(["tee", "/etc/apt/apt.conf.d/60nbagent"], input=UNATTENDED)
    host.run(["apt-get", "-q", "update"], timeout=300)


def changes(newer: list[str], older: list[str], version: str) -> dict[str, list[list[str]]]:
    """The commands of each change, by its name. `version` is the newer one."""
    apt = ["apt-get", "-q", "install", "-y", "--allow-downgrades", "-o", "Dpkg::Options::=--force-confold"]
    services = [plan.SUPERVISOR, plan.API, plan.ROUTER]
    return {
        "a newer version by unattended-upgrades": [
            ["unattended-upgrade", "-v"],
            ["sh", "-c", f"dpkg-query -W -f '${{Version}}' nbagent | grep -Fx '{version}'"],
        ],
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
        "needrestart after an update of libraries": [
            ["sh", "-ec", REPLACED], ["needrestart", "-r", "a"], ["sh", "-ec", GONE_ON],
        ],
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
        say(f"{len(self.users)} users have notebooks")
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
        if self.book.refusals:
            self.book.problem(f"claims were refused: {dict(self.book.refusals)}")
        Reboot(self.host, self.book, [user.slot for user in self.users if user.claimed]).run()


class Reboot:
    """A reboot of the host while `slots` have users, and a caller claims another until it gets it."""

    def __init__(self, host: Host, book: Book, slots: list[str]) -> None:
        self.host, self.book, self.slots = host, book, slots
        self.reasons: Counter[str] = Counter()
        self.is_over = threading.Event()
        # The refusals of a host that shuts down are expected.
        self.caller = Caller(host, Book())
        # The loopback interface goes down with the host, and a connection that is open then gets no answer.
        self.caller.api = Api(host, timeout=15)

    def run(self) -> None:
        before = self._lasting()
        page = threading.Thread(target=self._read_reasons)
        page.start()
        began_s = time.monotonic()
        self.host.run(["systemctl", "reboot"], check=False)
        with ThreadPoolExecutor(1) as threads:
            claiming = threads.submit(self.caller.claim)
            self.host.boot_again(say=say)
            claim = claiming.result()
        if claim is not None and Api(self.host).get(f"/slots/{claim['slot']}").status == 404:
            claim = self.caller.claim()  # the first was answered before the host shut down
        claimed_s = time.monotonic() - began_s
        self.is_over.set()
        page.join()
        for text in self.caller.book.problems:
            self.book.problem(f"claims beside the reboot: {text}")
        if set(self.reasons) != {SHUTDOWN}:
            self.book.problem(f"pages got these reasons for the end of their sessions: {dict(self.reasons)}")
        if claim is not None:
            self._check_rest({str(claim["slot"])})
            self.caller.release(str(claim["slot"]))
        after = self._lasting()
        if before != after:
            self.book.problem(f"images or settings were {before} and are {after}")
        self._check_former()
        say(f"a reboot: a claim got a slot {claimed_s:.1f} s after the command; {dict(self.caller.book.refusals)}")

    def _read_reasons(self) -> None:
        """Reads the file of a session as its page does, until the router ends."""
        router = Api(self.host, ROUTER_PORT, timeout=5)
        while not self.is_over.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                answer = router.get(f"/user/{self.slots[0]}/nbagent/session")
                if answer.status == 200 and (session := answer.json())["state"] == "ended":
                    self.reasons[session["reason"]] += 1
            time.sleep(0.05)

    def _lasting(self) -> dict[str, Any]:
        """The images and the settings in force."""
        images = [(image["name"], image["digest"]) for image in Api(self.host).get("/images").json()]
        return {"images": images, "settings": self.host.run(["nbagent", "config", "check", "--json"]).stdout}

    def _check_rest(self, held: set[str]) -> None:
        with Inside(self.host) as inside:
            until_s = time.monotonic() + REST_S
            while found := differences(Api(self.host).get("/slots").json(), inside.census, held):
                if time.monotonic() > until_s:
                    self.book.problem(f"after the reboot not at rest: {'; '.join(found)}")
                    return
                time.sleep(0.5)

    def _check_former(self) -> None:
        """Neither the API nor the router has a slot of before."""
        api, router = Api(self.host), Api(self.host, ROUTER_PORT)
        for slot in self.slots:
            found = [api.get(f"/slots/{slot}").status, router.get(f"/user/{slot}/lab").status,
                     router.get(f"/user/{slot}/nbagent/session").status]
            if found != [404, 404, 404]:
                self.book.problem(f"slot {slot} of before the reboot: {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--users", type=int, default=30)
    parser.add_argument("--claimers", type=int, default=3)
    parser.add_argument("--name", default=NAME, help="of the test host")
    parser.add_argument("--keep", action="store_true", help="leave the host up, and use one that is up")
    options = parser.parse_args()
    host = Host.up(name=options.name, packages=("needrestart", "unattended-upgrades"), say=say)
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
                if suffix == NEWER:
                    offer(host, made, Path(directory))
        run = Upgrade(host, options)
        run.run(changes(*found, f"{__version__}{NEWER}"))
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
