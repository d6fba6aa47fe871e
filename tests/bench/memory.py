#!/usr/bin/python3
"""What memory a side uses, as JSON: runs as root on the host that is measured, in as many processes as processors.

    memory.py SLOTS SERVICES [UNIT]

SLOTS and SERVICES are regular expressions of units; what is below such a unit's cgroup counts. KiB everywhere.
PSS shares a page that several processes have among them, so the sum over all is what they really have; `private` is
what a process alone has. `roles` tell a slot's processes apart by their number in its pid namespace. With UNIT, its
processes' processor seconds and RSS as well.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

Found = dict[str, Counter[str]]
_TICKS = os.sysconf("SC_CLK_TCK")


def units_of(pid: str) -> tuple[list[str], str]:
    """The unit names in a process's cgroup path, and its path in the memory controller."""
    lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    named = [path for _, controllers, path in lines if controllers == "name=systemd"] or [lines[-1][2]]
    memory = [f"memory{path}" for _, controllers, path in lines if controllers == "memory"] or [lines[-1][2].strip("/")]
    return named[0].split("/"), memory[0]


def measure(pid: str, role: str) -> tuple[str, Counter[str]] | None:
    """One process's figures; None when it is gone, or a kernel thread."""
    try:
        rollup = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE))
        status = dict(re.findall(r"^(\w+):\s+(.+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
    except OSError:
        return None
    if not rollup:
        return None
    if role == "slots":
        inner = int(status["NSpid"].split()[-1])
        role = {1: "init", 2: "server"}.get(inner, "kernel") if len(status["NSpid"].split()) > 1 else "slots"
    return role, Counter(
        pss=int(rollup["Pss"]), private=int(rollup["Private_Clean"]) + int(rollup["Private_Dirty"]),
        rss=int(rollup["Rss"]), page_tables=int(status["VmPTE"].split()[0]), processes=1,
        threads=int(status["Threads"]),
    )


def _measure(job: tuple[str, str]) -> tuple[str, Counter[str]] | None:
    return measure(*job)


def kernel_memory(cgroups: set[str]) -> int:
    """KiB of the kernel's own memory (page tables, stacks, inodes, sockets) charged to these cgroups."""
    total = 0
    for path in cgroups:
        try:
            if path.startswith("memory/"):
                total += int(Path(f"/sys/fs/cgroup/{path}/memory.kmem.usage_in_bytes").read_text())
            else:
                stat = Path(f"/sys/fs/cgroup/{path}/memory.stat").read_text()
                total += int(dict(line.split() for line in stat.splitlines()).get("kernel", 0))
        except (OSError, ValueError):
            continue
    return total // 1024


def meminfo() -> dict[str, int]:
    """The machine's own books."""
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
    wanted = ("MemTotal", "MemAvailable", "PageTables", "KernelStack", "Slab", "Shmem")
    return {name: int(found[name]) for name in wanted}


def used_by(unit: str) -> dict[str, float]:
    """Processor seconds and RSS of the processes of one unit."""
    cpu_s = rss_kib = 0.0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if unit in units_of(process.name)[0]:
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                cpu_s += (int(fields[11]) + int(fields[12])) / _TICKS
                rss_kib += int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 1024
        except OSError:
            continue
    return {"cpu_s": cpu_s, "rss": rss_kib}


def main(slots: str, services: str, unit: str = "") -> None:
    """Measures and prints."""
    began_s, books = time.monotonic(), meminfo()
    if unit:
        print(json.dumps({"meminfo": books, "unit": used_by(unit), "clock_s": began_s}))
        return
    jobs, cgroups = [], set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            units, memory = units_of(process.name)
        except OSError:
            continue
        for role, pattern in (("slots", slots), ("services", services)):
            if any(re.fullmatch(pattern, part) for part in units):
                jobs.append((process.name, role))
                if role == "slots":
                    cgroups.add(memory)
                break
    roles: Found = {}
    with multiprocessing.Pool() as pool:
        for found in pool.imap_unordered(_measure, jobs, chunksize=16):
            if found:
                roles.setdefault(found[0], Counter()).update(found[1])
    total: Counter[str] = sum(roles.values(), Counter())
    document: dict[str, Any] = {
        "total": total, "roles": roles, "kernel": kernel_memory(cgroups), "meminfo": books,
        "took_s": round(time.monotonic() - began_s, 2),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main(*sys.argv[1:])
