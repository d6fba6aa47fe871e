#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""The memory of a side, as JSON: runs as root on the measured host, in as many processes as processors.

    memory.py SLOTS SERVICES [UNIT]

SLOTS and SERVICES are regular expressions of units; all processes below a unit's cgroup are counted. KiB everywhere.
PSS divides a shared page by the processes that map it, so that the sum over all is their memory; `private` are pages
that one process maps. `roles` are derived from the pid in the slot's pid namespace: 1 is init; the next is the fork
server when its parent is outside, as a zygote is; the next the server; all others are kernels and their children.
With UNIT, only the processor seconds and RSS of its processes.
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

_TICKS = os.sysconf("SC_CLK_TCK")


def units_of(pid: str) -> tuple[list[str], str]:
    """The unit names in a process's cgroup path, and its path in the memory controller."""
    lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    named = [path for _, controllers, path in lines if controllers == "name=systemd"] or [lines[-1][2]]
    memory = [f"memory{path}" for _, controllers, path in lines if controllers == "memory"] or [lines[-1][2].strip("/")]
    return named[0].split("/"), memory[0]


def measure(pid: str) -> tuple[int, int, Counter[str]] | None:
    """A process's number in its innermost pid namespace, 0 if that is the host's, its parent and its figures.

    None when it has ended.
    """
    try:
        rollup = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE))
        status = dict(re.findall(r"^(\w+):\s+(.+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
    except OSError:
        return None
    if not rollup:
        return None
    numbers = [int(number) for number in status["NSpid"].split()]
    return numbers[-1] if len(numbers) > 1 else 0, int(status["PPid"]), Counter(
        pss=int(rollup["Pss"]), private=int(rollup["Private_Clean"]) + int(rollup["Private_Dirty"]),
        rss=int(rollup["Rss"]), page_tables=int(status["VmPTE"].split()[0]), processes=1,
        threads=int(status["Threads"]),
    )


def roles_of(processes: list[tuple[int, bool]]) -> list[str]:
    """The role of each process of one slot, by its pid in the slot's pid namespace and whether its parent is outside
    the slot; processes of peers are not in a pid namespace."""
    later = sorted(process for process in processes if process[0] > 1)
    names = {0: "slots", 1: "init"}
    if later and later[0][1]:
        names[later.pop(0)[0]] = "fork_server"
    if later:
        names[later[0][0]] = "server"
    return [names.get(number, "kernel") for number, _ in processes]


def kernel_memory(cgroups: set[str]) -> int:
    """KiB of kernel memory (page tables, stacks, inodes, sockets) charged to these cgroups."""
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
    """Memory figures of the machine, from /proc/meminfo."""
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
    pids, groups = [], []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            units, memory = units_of(process.name)
        except OSError:
            continue
        for role, pattern in (("slots", slots), ("services", services)):
            if unit := next((part for part in units if re.fullmatch(pattern, part)), ""):
                groups.append((role, memory if role == "slots" else unit))
                pids.append(process.name)
                break
    with multiprocessing.Pool() as pool:
        measured = pool.map(measure, pids, chunksize=16)
    roles: dict[str, Counter[str]] = {}
    pss_of: Counter[str] = Counter()
    slots_processes: dict[str, list[tuple[int, bool, Counter[str]]]] = {}
    of_slots = {int(pid) for pid, (role, _) in zip(pids, groups, strict=True) if role == "slots"}
    for (role, group), found in zip(groups, measured, strict=True):
        if found and role == "slots":
            number, parent, figures = found
            slots_processes.setdefault(group, []).append((number, parent not in of_slots, figures))
        elif found:
            roles.setdefault(role, Counter()).update(found[2])
            pss_of[group] += found[2]["pss"]
    for processes in slots_processes.values():
        named = roles_of([(number, outside) for number, outside, _ in processes])
        for role, (_, _, figures) in zip(named, processes, strict=True):
            roles.setdefault(role, Counter()).update(figures)
    total: Counter[str] = sum(roles.values(), Counter())
    document: dict[str, Any] = {
        "total": total, "roles": roles, "services": pss_of, "kernel": kernel_memory(set(slots_processes)),
        "meminfo": books, "took_s": round(time.monotonic() - began_s, 2),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main(*sys.argv[1:])
