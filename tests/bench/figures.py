"""Figures: samples of two sides, what is said of them, and how a reader sees them. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Row:
    """One figure. `how` says what is timed, for a stranger to repeat it; `loads` are the machine's
    one-minute load averages while it was measured. An empty `peer` has nothing to compare with."""

    name: str
    unit: str
    how: str
    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)

    def ratio(self) -> float | None:
        """How many times the peer's median is ours."""
        return statistics.median(self.peer) / statistics.median(self.ours) if self.peer and self.ours else None

    def document(self) -> dict[str, Any]:
        """The figure as JSON: what is said of it, and every sample."""
        return {
            "name": self.name, "unit": self.unit, "how": self.how, "ratio": self.ratio(),
            "load": statistics.median(self.loads) if self.loads else None,
            "ours": summary(self.ours), "peer": summary(self.peer),
        }


def quantile(samples: Sequence[float], share: float) -> float:
    """The sample below which `share` of all lie: the nearest one, none is invented between two."""
    return sorted(samples)[min(len(samples) - 1, int(share * len(samples)))]


def summary(samples: Sequence[float]) -> dict[str, Any] | None:
    """What is said of one side's samples, or None when there are none."""
    if not samples:
        return None
    shares = {"p10": 0.1, "p90": 0.9, "p99": 0.99}
    return {
        "n": len(samples), "p50": statistics.median(samples),
        **{name: quantile(samples, share) for name, share in shares.items()}, "samples": list(samples),
    }


HEADINGS = ("", "nbagent p50", "p10..p90", "p99", "n", "peer p50", "p10..p90", "n", "ratio", "load")


def cells(row: Row, number: int) -> tuple[str, ...]:
    """One line of the table."""
    ours, peer, ratio = summary(row.ours), summary(row.peer), row.ratio()
    load = f"{statistics.median(row.loads):.1f}" if row.loads else ""
    return (
        f"{row.name} ({number})",
        *(_side(ours, row.unit)), _number(ours["p99"]) if ours and ours["n"] >= 20 else "-",
        str(ours["n"]) if ours else "0",
        *(_side(peer, row.unit)), str(peer["n"]) if peer else "-",
        f"{ratio:.3g}" if ratio else "-", load,
    )


def text(rows: Sequence[Row]) -> str:
    """The table for a terminal, and below it how each figure is measured."""
    lines = [HEADINGS, *(cells(row, number) for number, row in enumerate(rows, 1))]
    return "\n".join([columns(lines), "", *(f"({number}) {row.how}" for number, row in enumerate(rows, 1))])


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Cells below each other: words to the left, numbers to the right; long words are cut."""
    cut = [[cell if len(cell) <= 76 else f"{cell[:75]}…" for cell in line] for line in lines]
    made = []
    for column in zip(*cut, strict=True):
        numbers = column[1][:1].isdigit() or column[1].startswith("-")
        width = max(map(len, column))
        made.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*made, strict=True))


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown, and below it how each figure is measured."""
    lines = [HEADINGS, tuple(["---"] + ["--:"] * (len(HEADINGS) - 1))]
    lines += [cells(row, number) for number, row in enumerate(rows, 1)]
    table = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*table, "", *(f"{number}. {row.how}" for number, row in enumerate(rows, 1))])


def _side(found: dict[str, Any] | None, unit: str) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    return f"{_number(found['p50'])} {unit}", f"{_number(found['p10'])}..{_number(found['p90'])}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
