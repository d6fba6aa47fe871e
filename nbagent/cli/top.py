# SPDX-License-Identifier: BSD-3-Clause
"""`nbagent top`: the slots of a host by their use of processor or memory, repeatedly on a terminal.

The use of the processor is that between two samples, since the API has the total of each slot only.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbagent.cli import tables
from nbagent.core.errors import NbagentError
from nbagent.core.quantities import format_duration, format_size

if TYPE_CHECKING:
    from rich.console import Group

COLUMNS = ("SLOT", "STATE", "IMAGE", "CPU%", "MEMORY", "SWAPPED", "IDLE", "AGE", "CPU", "TASKS", "OOM", "EXPIRES")
# The keys that select an order on a terminal are the first letters.
ORDERS = ("cpu", "memory", "idle", "age")
FIRST_S = 1.0
# Lines that are not rows: two of figures, the head of the table with its rule and an empty line above and below the
# table, the number of slots that are not shown, and the caption.
OTHER_LINES = 8


@dataclass(frozen=True)
class Sample:
    """The figures and slots of the host, read at a time of the monotonic clock."""

    at_s: float
    stats: Mapping[str, Any]
    slots: Sequence[Mapping[str, Any]]


class Source:
    """Reads samples from the API, through `call` with method and path."""

    def __init__(self, call: Callable[[str, str], Any]) -> None:
        self._call = call

    def sample(self) -> Sample:
        """One sample. Raises NbagentError."""
        return Sample(time.monotonic(), self._call("GET", "/stats"), self._call("GET", "/slots"))


def measured(before: Sample, after: Sample) -> list[dict[str, Any]]:
    """The slots of `after`, each with `cpu_percent` of one processor since `before`, None for a new slot."""
    former = {slot["slot"]: slot.get("cpu_s") for slot in before.slots}
    past_s = max(after.at_s - before.at_s, 0.001)

    def percent(slot: Mapping[str, Any]) -> float | None:
        then, now = former.get(slot["slot"]), slot.get("cpu_s")
        return None if then is None or now is None else round(max(0.0, now - then) / past_s * 100, 1)

    return [{**slot, "cpu_percent": percent(slot)} for slot in after.slots]


def ordered(slots: Sequence[Mapping[str, Any]], order: str) -> list[Mapping[str, Any]]:
    """The slots with the largest value first; those without a value last, and by id where values are the same."""
    field = {"cpu": "cpu_percent", "memory": "memory_bytes", "idle": "idle_s", "age": "age_s"}[order]

    def key(slot: Mapping[str, Any]) -> tuple[bool, float, str]:
        value = slot.get(field)
        return value is None, -(value or 0), slot["slot"]

    return sorted(slots, key=key)


def row(slot: Mapping[str, Any], now: datetime.datetime) -> tuple[str, ...]:
    """The cells of COLUMNS for a slot of `measured`."""
    cells = dict(zip(tables.SLOT_COLUMNS, tables.slot_row(slot, now), strict=True))
    share, swapped = slot.get("cpu_percent"), slot.get("swapped_bytes")
    cells["CPU%"] = "-" if share is None else f"{share:.0f}"
    cells["SWAPPED"] = "-" if swapped is None else format_size(swapped)
    return tuple(cells[name] for name in COLUMNS)


def head(stats: Mapping[str, Any]) -> tuple[str, str]:
    """Two lines about the host."""
    conditions = [name for name, holds in (("draining", stats["draining"]), ("not ready", not stats["ready"])) if holds]
    conditions += [f"{part} fails" for part in stats.get("faults", {})]
    up, memory = format_duration(stats["uptime_s"]), format_size(stats["memory_available_bytes"])
    free = f"{stats['available']} of {stats['capacity']} slots free"
    counts = ", ".join(f"{stats[state]} {state}" for state in ("claimed", "warm", "starting", "stopping"))
    return (
        ", ".join([f"host {stats['label']}: {free}", f"up {up}", *conditions]),
        f"slots: {counts}; {memory} of memory available",
    )


def once(source: Source, order: str, interval_s: float) -> tuple[Sample, list[Mapping[str, Any]]]:
    """One measurement over `interval_s`: the sample at its end, and the slots in order."""
    before = source.sample()
    time.sleep(interval_s)
    after = source.sample()
    return after, ordered(measured(before, after), order)


def show(source: Source, order: str, interval_s: float) -> None:
    """Shows the slots on the terminal until interrupted, or until the key q."""
    from rich.live import Live
    from rich.text import Text

    before = after = source.sample()
    pause_s, trouble = min(FIRST_S, interval_s), ""
    with contextlib.suppress(KeyboardInterrupt), _keys() as key, Live(screen=True, auto_refresh=False) as live:
        while True:
            shown = screen(before, after, order, live.console.height)
            caption = trouble or f"{datetime.datetime.now(datetime.UTC):%H:%M:%S} UTC, every {interval_s:g} s"
            keys = ", ".join(f"{name[0]} {name}" for name in ORDERS)
            shown.renderables.append(Text(f"{caption}; by {order}; keys: {keys}, q end", "dim"))
            live.update(shown, refresh=True)
            pressed = key(pause_s)
            if pressed == "q":
                return
            order = next((name for name in ORDERS if pressed and name.startswith(pressed)), order)
            if not pressed:
                pause_s = interval_s
                try:
                    before, after, trouble = after, source.sample(), ""
                except NbagentError as error:
                    trouble = str(error)  # the API may be restarting, so the last rows stay on the screen


def screen(before: Sample, after: Sample, order: str, height: int) -> Group:
    """The figures, and as many slots as a terminal of so many lines has room for beside a caption."""
    from rich.console import Group
    from rich.text import Text

    now = datetime.datetime.now(datetime.UTC)
    rows = [row(slot, now) for slot in ordered(measured(before, after), order)]
    first, second = head(after.stats)
    room = max(1, height - OTHER_LINES)
    left = len(rows) - room
    more = [Text(f"and {left} more slots", "dim")] if left > 0 else []
    return Group(Text(first, "bold"), Text(second), tables.table(COLUMNS, rows[:room]), *more)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key, and returns it, or "" after that time.

    Keys are read one by one and not shown, while signals such as that of Ctrl-C remain. Without a terminal as standard
    input it waits only.
    """
    terminal = sys.stdin.fileno() if sys.stdin.isatty() else None

    def key(seconds: float) -> str:
        if terminal is None:
            time.sleep(seconds)
            return ""
        ready, _, _ = select.select([terminal], [], [], seconds)
        return os.read(terminal, 1).decode("ascii", "replace") if ready else ""

    if terminal is None:
        yield key
        return
    former = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    try:
        yield key
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, former)
