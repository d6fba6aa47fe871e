#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make test-doctor`: while a fault lasts, `nbagent doctor` names its cause and its remedy; afterwards it is silent.

    tests/chaos/diagnoses.py [--only NAME] [--machine vm] [--name HOST] [--keep]

Each fault begins on a host at rest, and lasts for one `nbagent doctor`, which has to end in time. The findings that a
host without a fault does not have, exit status and time go to standard output and to $NBAGENT_CACHE/chaos.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import hosts
from inside_host import Act, Inside, fault, shell
from plan import API, BUS, JOURNAL, LAUNCH, NETWORK, ROUTER, SUPERVISOR, UNITS, ZYGOTE_PROCESS, ZYGOTE_SERVICE

import product
from product import say
from testhost_driver import Host

NAME = "diagnoses"
# Of `nbagent doctor`, and until it is silent after a fault.
DOCTOR_MAX_S, SILENT_MAX_S = 60.0, 120.0
DNS = "nbagent-dns.service"
IMAGES = "/var/lib/nbagent/images"
Findings = dict[str, dict[str, str]]


class Case(NamedTuple):
    """A fault, and the right finding: its name, its status, and expressions that its text and its remedy match.

    `name` "" means that `nbagent doctor` has to find nothing, because claims go on. `at_times`: only some calls of a
    service fail, so that there may be a finding or not. `settle_s` is the time from the begin of the fault to the
    examination.
    """

    fault: str
    begin: Act
    end: Act
    name: str
    status: str = "fail"
    found: str = ""
    mend: str = ""
    settle_s: float = 0.0
    machine: str = ""
    at_times: bool = False


def stopped(service: str, finding: str, *sockets: str) -> Case:
    """A service that was stopped with its sockets, so that nothing starts it."""
    units = " ".join((*sockets, service))
    return Case(
        f"{service} is stopped", shell(f"systemctl stop {units}"), shell(f"systemctl start {units}"), finding, "fail",
        "inactive", f"systemctl start {finding}",
    )


def frozen(service: str, name: str, status: str, found: str, mend: str) -> Case:
    return Case(f"{service} is frozen", fault("freeze", service), ("end", "freeze"), name, status, found, mend)


def near_limit(kind: str, unit: str) -> Case:
    """A service that can take little more of a resource than it has. It may also end by that."""
    shown = "nbagent-zygote@" if unit == ZYGOTE_SERVICE else unit
    return Case(
        f"{kind} of {unit} are limited", fault(kind, unit), ("end", kind), "limits of services|restarts", "warn",
        f"{shown}.* (has \\d+ of \\d+ |has ended)", f"journalctl -eu {shown}",
    )


def changed(path: str, command: str) -> tuple[Act, Act]:
    """A file or directory that a command changes, and its former content."""
    begin = f"set -e; path={path}; cp -a $path /root/former; {command}"
    return shell(begin), shell(f"path={path}; rm $path; mv /root/former $path")


def without_user(user: str, unit: str) -> Case:
    begin, end = changed("/etc/passwd", f"sed -i '/^{user}:/d' $path")
    return Case(
        f"no user {user}", begin, end, "users", "fail", f"missing: {user}; ",
        f"systemd-sysusers nbagent.conf; then systemctl restart {unit}",
    )


def cases() -> Iterator[Case]:
    yield stopped(SUPERVISOR, SUPERVISOR, "nbagent.socket")
    yield stopped(API, "nbagent-api.socket", "nbagent-api.socket")
    yield stopped(ROUTER, ROUTER, "nbagent-router.socket")
    yield stopped(UNITS, "nbagent-units.socket", "nbagent-units.socket")
    yield stopped(LAUNCH, "nbagent-launch.socket", "nbagent-launch.socket")
    yield stopped(NETWORK, NETWORK, "nbagent-network.socket")
    yield stopped(DNS, DNS)
    journal = "systemd-journald.socket systemd-journald-dev-log.socket systemd-journald-audit.socket systemd-journald"
    yield Case(
        f"{JOURNAL} is stopped", shell(f"systemctl stop {journal}"), shell(f"systemctl start {journal}"), "journald",
        "warn", "it writes no entries", "systemctl restart systemd-journald",
    )
    yield Case(
        f"{BUS} is stopped", shell("systemctl stop dbus.socket dbus"), shell("systemctl start dbus.socket dbus"), "",
    )
    yield frozen(SUPERVISOR, "supervisor", "fail", "no response", "systemctl restart nbagent.service")
    yield frozen(API, "API", "fail", "no response", "systemctl restart nbagent-api")
    yield frozen(ROUTER, "router", "fail", "no response", "systemctl restart nbagent-router")
    yield frozen(UNITS, "supervisor", "fail", "systemd: no response", "systemctl restart nbagent-units")
    yield frozen(LAUNCH, "start of a slot", "fail", "no response", "systemctl restart nbagent-launch")
    yield frozen(NETWORK, "supervisor", "fail", "network: no response", "systemctl restart nbagent-network")
    yield frozen(DNS, "resolver of slots", "fail", "no response", "systemctl restart nbagent-dns")
    yield frozen(ZYGOTE_SERVICE, "start of a slot", "warn", "by exec .*; its zygote failed", "journalctl")
    yield frozen(ZYGOTE_PROCESS, "start of a slot", "warn", "by exec .*; its zygote failed", "journalctl")
    yield frozen(JOURNAL, "journald", "warn", "no response within", "systemctl restart systemd-journald")
    yield frozen(BUS, "", "ok", "", "")
    yield Case(
        "PID 1 is frozen", fault("freeze PID 1", "init.scope"), ("end", "freeze PID 1"), "service manager", "fail",
        "does not respond", "systemctl reboot",
    )
    for resource in ("blocks", "inodes"):
        yield Case(
            f"no {resource} of /run", fault("full", f"{resource} of /run"), ("end", "full"), "supervisor", "fail",
            "records: .*No space left", "df /run",
        )
        limit = {"blocks": "size=4k", "inodes": "nr_inodes=1"}[resource]
        full = f"mount -t tmpfs -o {limit} tmp /tmp; head -c 4096 /dev/zero > /tmp/x; true"
        yield Case(
            # /var/tmp serves as well.
            f"no {resource} of /tmp", shell(full), shell("umount /tmp"), "",
        )
    for unit in (SUPERVISOR, API, ROUTER, UNITS, LAUNCH, NETWORK, ZYGOTE_SERVICE):
        yield near_limit("descriptors", unit)
    for unit in (SUPERVISOR, API, UNITS, LAUNCH, NETWORK, "nbagent.slice"):
        yield near_limit("tasks", unit)
    for unit in (SUPERVISOR, API, UNITS, LAUNCH, NETWORK):
        yield near_limit("memory", unit)
        for kind in ("input/output errors", "slow files", "failed allocations"):
            yield Case(f"{kind} of {unit}", fault(kind, unit), ("end", kind), "", at_times=True)
    yield Case(
        "an error in router.d", shell("mkdir -p /etc/nbagent/router.d; echo 'x' > /etc/nbagent/router.d/bad.conf"),
        shell("rm /etc/nbagent/router.d/bad.conf"), "router files", "fail", "bad.conf", "mend the file",
    )
    yield Case(
        "a wrong setting", shell("echo '[slots]\nmemery = 1' > /etc/nbagent/conf.d/90-wrong.toml"),
        shell("rm /etc/nbagent/conf.d/90-wrong.toml"), "configuration", "fail", "90-wrong.toml", "nbagent config check",
    )
    yield Case(
        "a token that others can read", shell("chmod 0644 /etc/nbagent/token"), shell("chmod 0600 /etc/nbagent/token"),
        "token", "fail", "mode 0644", "chmod 0600",
    )
    yield Case("the host drains", shell("nbagent drain"), shell("nbagent drain --off"), "supervisor", "warn",
               "draining", "nbagent drain --off")
    yield without_user("nbagent", SUPERVISOR)
    yield without_user("nbagent-router", ROUTER)
    minimal = f"$(readlink -f {IMAGES}/names/minimal)"
    yield Case(
        "the default image has no name", shell(f"mv {IMAGES}/names/minimal /root/former"),
        shell(f"mv /root/former {IMAGES}/names/minimal"), "images", "fail", "the store is empty", "apt install", 5.0,
    )
    begin, end = changed(f"{minimal}/image.json", "truncate -s 5 $path")
    yield Case(
        "the record of the image is damaged", begin, end, "images", "fail", "image minimal cannot be read",
        "nbagent image remove minimal", 5.0,
    )
    page = f"{minimal}/rootfs/usr/lib/os-release"
    begin, end = changed(page, "echo x >> $path")
    yield Case("a file of the image has changed", begin, end, "images", "fail", "os-release", "nbagent image remove")
    # Python reads the compiled module and not its source.
    library = f"$(find {minimal}/rootfs -path '*/tornado/__pycache__/web.*.pyc' | head -n 1)"
    begin, end = changed(library, "truncate -s 20 $path; systemctl kill -s KILL 'nbagent-zygote@*'")
    yield Case(
        "the image is damaged, and its zygote is killed", begin, end, "images", "fail", "tornado/__pycache__/web",
        "nbagent image remove", 5.0,
    )
    for step in ("an hour ahead", "an hour back", "ten years ahead"):
        yield Case(f"the clock is {step}", fault("clock", step), ("end", "clock"), "", machine="vm")


def doctor(host: Host) -> tuple[Findings, int, float]:
    """The findings that are not ok by name, the exit status, and the time."""
    began_s = time.monotonic()
    done = host.run(["nbagent", "doctor", "--json"], check=False, timeout=300)
    took_s = time.monotonic() - began_s
    if done.returncode not in (0, 1):
        raise RuntimeError(f"nbagent doctor ended with {done.returncode}: {done.stderr}")
    return {one["name"]: one for one in json.loads(done.stdout) if one["status"] != "ok"}, done.returncode, took_s


def wrong(case: Case, new: Findings, status: int, took_s: float, max_s: float) -> list[str]:
    """The errors of an examination; `new` has the findings that a host without a fault lacks."""
    found = [f"it took {took_s:.0f} s"] if took_s > max_s else []
    if status != any(one["status"] == "fail" for one in new.values()):
        found.append(f"its exit status was {status}")
    found += [f"{name!r} has no remedy" for name, one in new.items() if not one["mend"]]
    if not case.name:
        return [*found, f"it found {sorted(new)}"] if new and not case.at_times else found
    expected = {"name": case.name, "status": case.status, "found": case.found, "mend": case.mend}
    if not any(all(re.search(text, one[key]) for key, text in expected.items()) for one in new.values()):
        found.append(f"no finding has {expected}")
    return found


class Run:
    """One run."""

    def __init__(self, host: Host, inside: Inside) -> None:
        self.host, self.inside, self.slower = host, inside, hosts.slower(host)
        self.results: dict[str, Any] = {}
        self.problems: list[str] = []
        # Faults that no process could be given, as one without CAP_SYS_RESOURCE cannot limit a zygote service.
        self.missed: list[str] = []
        self.before = self.until_silent(set())[0]

    def until_silent(self, names: set[str]) -> tuple[set[str], float]:
        """The names of findings of a host without a fault, and the time until it has no others than `names`, if any."""
        began_s = time.monotonic()
        while True:
            found, status, _ = doctor(self.host)
            silent = not status and (found.keys() <= names if names else "start of a slot" not in found)
            if silent or time.monotonic() > began_s + SILENT_MAX_S * self.slower:
                return set(found), time.monotonic() - began_s
            time.sleep(1)

    def try_one(self, case: Case) -> None:
        if not self.inside.act(case.begin):
            say(f"{case.fault}: nothing was hit")
            self.missed.append(case.fault)
            return
        try:
            time.sleep(case.settle_s)
            found, status, took_s = doctor(self.host)
        finally:
            self.inside.act(case.end)
        new = {name: one for name, one in found.items() if name not in self.before}
        problems = wrong(case, new, status, took_s, DOCTOR_MAX_S * self.slower)
        after, silent_s = self.until_silent(self.before)
        problems += [f"afterwards it finds {sorted(after - self.before)}"] if after - self.before else []
        self.results[case.fault] = {
            "findings": [f"{one['status']} {name}: {one['found']} → {one['mend']}"[:400] for name, one in new.items()],
            "status": status, "took_s": round(took_s, 1), "silent_s": round(silent_s, 1),
        }
        say(f"{case.fault}: {json.dumps(self.results[case.fault], indent=1, ensure_ascii=False)}")
        for text in problems:
            say(f"    PROBLEM {text}")
            self.problems.append(f"{case.fault}: {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", action="append", metavar="TEXT", help="faults whose name has this text")
    parser.add_argument("--machine", choices=("nspawn", "vm"), default="nspawn")
    parser.add_argument("--name", default=NAME, help="of the test host")
    parser.add_argument("--keep", action="store_true", help="leave the host up, and use one that is up")
    options = parser.parse_args()
    suite = "trixie" if options.machine == "vm" else "bookworm"
    chosen = [
        case for case in cases() if case.machine in ("", options.machine)
        and (not options.only or any(text in case.fault for text in options.only))
    ]
    running = hosts.running(options.name, keep=options.keep, driver=options.machine, suite=suite)
    with running as host, Inside(host) as inside:
        run = Run(host, inside)
        for case in chosen:
            run.try_one(case)
    out = product.CACHE / "chaos"
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "without_fault": sorted(run.before), "faults": run.results, "missed": run.missed, "problems": run.problems,
    }
    (out / "diagnoses.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if run.problems:
        raise SystemExit("\n".join((f"{len(run.problems)} problems", *run.problems)))


if __name__ == "__main__":
    main()
