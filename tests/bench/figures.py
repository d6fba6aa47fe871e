# SPDX-License-Identifier: BSD-3-Clause
"""Figures: samples of several sides, their statistics, and tables of them. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Column:
    """One figure. `how` describes the measurement, so that a reader can repeat it."""

    key: str
    heading: str
    unit: str
    how: str
    more_is_better: bool = False
    of_all: bool = False  # the time of all starts of a burst: comparable only for equal numbers


@dataclass
class Line:
    """One side with its samples by column. `why` is the reason when it has none; `at_once` and `users` are counts.

    `again` has the reason of each repeated request for a kernel.
    """

    key: str
    name: str
    how: str
    ours: bool
    at_once: int = 0
    users: int = 0
    why: str = ""
    again: list[str] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)

    def add(self, column: str, value: float) -> None:
        self.samples.setdefault(column, []).append(round(value, 3))

    def median(self, column: str) -> float | None:
        found = self.samples.get(column)
        return statistics.median(found) if found else None

    def document(self) -> dict[str, Any]:
        """The side as JSON: its statistics, and every sample."""
        return {
            "key": self.key, "name": self.name, "how": self.how, "at_once": self.at_once, "users": self.users,
            "why": self.why, "again": self.again,
            "figures": {column: summary(found) for column, found in self.samples.items()},
        }


def quantile(samples: Sequence[float], share: float) -> float:
    """The sample below which `share` of all lie: the nearest sample, without interpolation."""
    return sorted(samples)[min(len(samples) - 1, int(share * len(samples)))]


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """The statistics of samples, of which there must be at least one."""
    shares = {"p90": 0.9, "p99": 0.99}
    return {
        "n": len(samples), "p50": statistics.median(samples),
        **{name: quantile(samples, share) for name, share in shares.items()},
        "min": min(samples), "max": max(samples), "samples": list(samples),
    }


def better(line: Line, base: Line, column: Column) -> float | None:
    """How many times better than `base` the line's median is: 2 is half the time, half the memory or twice the rate."""
    ours, theirs = line.median(column.key), base.median(column.key)
    if not ours or not theirs or (column.of_all and line.at_once != base.at_once):
        return None
    return ours / theirs if column.more_is_better else theirs / ours


def number(value: float) -> str:
    """A number with three significant digits and without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def factor(value: float | None) -> str:
    return "-" if value is None else f"{number(value)}×"


def cell(line: Line, column: Column) -> str:
    """Median, and in brackets least and most where there are several samples."""
    found = line.samples.get(column.key)
    if not found:
        return "-"
    spread = f" ({number(min(found))}..{number(max(found))})" if len(found) > 1 else ""
    return number(statistics.median(found)) + spread


def comparison(lines: Sequence[Line], columns: Sequence[Column], base: Line) -> list[list[list[str]]]:
    """Two tables, each with a heading: the figures, and how many times better than `base` each is."""
    shown = [line for line in lines if line.samples]
    headings = [f"{column.heading}, {column.unit}" for column in columns]
    figures = [["", *headings, "at once", "users"]]
    figures += [
        [line.name, *(cell(line, column) for column in columns), str(line.at_once), str(line.users)] for line in shown
    ]
    ratios = [["times better than " + base.name, *headings]]
    ratios += [[line.name, *(factor(better(line, base, column)) for column in columns)] for line in shown]
    return [figures, ratios]


def notes(lines: Sequence[Line], columns: Sequence[Column]) -> list[str]:
    """The explanation of each column and line, and the reason for each missing line."""
    said = [f"{column.heading}: {column.how}" for column in columns]
    said += [f"{line.name}: {line.how}" for line in lines if line.how]
    said += [
        f"{line.name}: {len(line.again)} kernels did not start and were requested again: {line.again[0]}"
        for line in lines if line.again
    ]
    return said + [f"{line.name} is not in the table: {line.why}" for line in lines if line.why]


def columns_of(table: Sequence[Sequence[str]]) -> str:
    """A text table: words aligned left, numbers right; long words are cut."""
    cut = [[cell if len(cell) <= 76 else f"{cell[:75]}…" for cell in line] for line in table]
    made = []
    for position, column in enumerate(zip(*cut, strict=True)):
        width = max(map(len, column))
        made.append([cell.ljust(width) if position == 0 else cell.rjust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*made, strict=True))


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    rule = ["---", *["--:"] * (len(table[0]) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [table[0], rule, *table[1:]])


KERNEL = "kernel's own"


def per_user(found: Mapping[str, Any], users: int) -> dict[str, float]:
    """MiB for each user of the result of memory.py: the sum, and its parts.

    The parts are PSS by kind of process, and kernel memory, which PSS does not count.
    """
    roles = {role: kinds["pss"] for role, kinds in found["roles"].items()}
    parts = {role: roles.get(role, 0) for role in ("init", "fork_server", "server", "kernel", "slots", "services")}
    kib = {"all": sum(roles.values()), **parts, KERNEL: found["kernel"]}
    return {name: value / users / 1024 for name, value in kib.items()}


def taken(before: Mapping[str, Any], after: Mapping[str, Any], users: int) -> float:
    """The decrease of MemAvailable between two samples, in MiB for each user."""
    lost: float = before["meminfo"]["MemAvailable"] - after["meminfo"]["MemAvailable"]
    return lost / users / 1024


def latency(samples_ms: Sequence[float]) -> dict[str, float]:
    """The statistics of many users' waits, in milliseconds."""
    found = summary(samples_ms)
    return {name: round(found[name], 2) for name in ("n", "p50", "p90", "p99", "max")}


def beside_quiet(rounds: Sequence[Mapping[str, Sequence[float]]], load: str, quiet: str) -> dict[str, float]:
    """Medians over the rounds of a load's p50, p99, and of p99 divided by that of the quiet samples of the same round.

    Each round is compared with itself, because the speed of the machine changes between rounds.
    """
    p50 = [statistics.median(found[load]) for found in rounds]
    p99 = [quantile(found[load], 0.99) for found in rounds]
    ratios = [own / quantile(found[quiet], 0.99) for own, found in zip(p99, rounds, strict=True)]
    return {name: statistics.median(values) for name, values in (("p50", p50), ("p99", p99), ("ratio", ratios))}
