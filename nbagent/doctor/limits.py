# SPDX-License-Identifier: BSD-3-Clause
"""Whether nbagent's services are near limits of their own, or have ended lately.

A service that reaches a limit serves some requests, and fails with others. So the trial of a start may succeed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from nbagent.doctor.finding import Finding
from nbagent.doctor.system import text_of

UNITS = (
    "nbagent.service", "nbagent-api.service", "nbagent-router.service", "nbagent-units.service",
    "nbagent-launch.service", "nbagent-network.service", "nbagent-dns.service", "nbagent-zygote@*.service",
    "nbagent.slice", "nbagent-slots.slice",
)
PROPERTIES = (
    "Id", "MainPID", "NRestarts", "ExecMainStartTimestampMonotonic", "TasksCurrent", "TasksMax", "MemoryCurrent",
    "MemoryMax",
)
# Less is nearly nothing: of memory by its part, of tasks and descriptors also by their number.
LEFT_MIN_PART, LEFT_MIN = 0.05, 10
RECENT_S = 60.0

Unit = Mapping[str, str]
Show = Callable[[Sequence[str], Sequence[str]], Sequence[Unit]]


def check_limits(root: Path, show: Show) -> Finding:
    """Whether services and slices have tasks, memory and descriptors left; `show` has the properties of units."""
    name = "limits of services"
    near = [text for unit in show(UNITS, PROPERTIES) for text in _near_limits(root, unit)]
    if not near:
        return Finding(name, "ok", "tasks, memory and descriptors are left")
    units = dict.fromkeys(text.partition(" ")[0] for text in near)
    mend = f"for the cause, see journalctl -eu {' -u '.join(units)}; to raise it, systemctl edit {next(iter(units))}"
    return Finding(name, "warn", "; ".join(near), mend)


def _near_limits(root: Path, unit: Unit) -> Iterator[str]:
    """A sentence for each limit that the unit nearly reaches."""
    found = [(what, _number(unit, f"{key}Current"), _number(unit, f"{key}Max")) for what, key in
             (("tasks", "Tasks"), ("bytes of memory", "Memory"))]
    pid = _number(unit, "MainPID") or 0
    children = text_of(root / f"proc/{pid}/task/{pid}/children", "").split() if pid else []
    found += [("descriptors", *_descriptors(root / f"proc/{one}")) for one in (pid, *children) if pid]
    for what, used, limit in found:
        least = LEFT_MIN if what != "bytes of memory" else 0
        if used is not None and limit is not None and limit - used < max(least, LEFT_MIN_PART * limit):
            yield f"{unit['Id']} has {used} of {limit} {what}"


def _number(unit: Unit, name: str) -> int | None:
    """A property of a unit, None for one that is not set, or without a limit."""
    text = unit.get(name, "")
    return int(text) if text.isdecimal() and int(text) < 1 << 63 else None


def _descriptors(process: Path) -> tuple[int | None, int | None]:
    """The open descriptors of a process and their limit; None for one that has ended."""
    limit = re.search(r"^Max open files +(\d+)", text_of(process / "limits", ""), re.MULTILINE)
    try:
        used = sum(1 for _ in (process / "fd").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return None, None
    return used, int(limit[1]) if limit else None


def check_restarts(show: Show, clock_s: Callable[[], float] = time.monotonic) -> Finding:
    """Whether services have ended lately, and were started again."""
    name, recent = "restarts", []
    for unit in show(UNITS, PROPERTIES):
        age_s = clock_s() - (_number(unit, "ExecMainStartTimestampMonotonic") or 0) / 1e6
        if (count := _number(unit, "NRestarts")) and age_s < RECENT_S:
            recent.append((unit["Id"], f"{unit['Id']} has ended {count} times, the last time {age_s:.0f} s ago"))
    if not recent:
        return Finding(name, "ok", f"no service has ended within {RECENT_S:g} s")
    mend = f"for the reason, see journalctl -eu {' -u '.join(unit for unit, _ in recent)}"
    return Finding(name, "warn", "; ".join(text for _, text in recent), mend)
