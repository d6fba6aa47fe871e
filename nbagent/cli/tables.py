# SPDX-License-Identifier: BSD-3-Clause
"""Prints documents of the API: as tables on a terminal, as columns of plain text otherwise.

rich is imported only for a terminal, because it is slow to load.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nbagent.core.quantities import format_duration, format_size

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")

SLOT_COLUMNS = ("SLOT", "STATE", "IMAGE", "LAUNCH", "AGE", "IDLE", "MEMORY", "CPU", "TASKS", "OOM", "EXPIRES")
IMAGE_COLUMNS = ("NAME", "DIGEST", "LAUNCH", "WARM", "DEFAULT", "REASON")
_STYLES = {"claimed": "green", "warm": "cyan", "starting": "yellow", "stopping": "dim", "failed": "red"}


def show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, or columns separated by spaces if standard output is not a terminal."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(table(columns, rows))
        return
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for cells in (columns, *rows):
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A rich table with states in color."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    # Text, because rich would interpret [brackets] in a plain str as markup.
    drawn = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
    for cells in rows:
        drawn.add_row(*(Text(cell, _STYLES.get(cell, "")) for cell in cells))
    return drawn


def show_facts(facts: Mapping[str, object]) -> None:
    """Print names and values, one on a line; names in a nested mapping are joined with dots."""
    for name, value in _flat(facts, ""):
        click.echo(f"{name:28} {'-' if value is None else value}")


def slot_row(slot: Mapping[str, Any], now: datetime.datetime) -> tuple[str, ...]:
    """The cells of SLOT_COLUMNS for a slot document; "-" for an unknown value."""
    used, limit = slot.get("memory_bytes"), slot["limits"]["memory_bytes"]
    expires = slot.get("expires_at")
    return (
        slot["slot"],
        slot["state"],
        slot["image"],
        slot.get("launch") or "-",
        format_duration(slot["age_s"]),
        _maybe(slot.get("idle_s"), format_duration),
        f"{_maybe(used, format_size)} of {format_size(limit)}",
        _maybe(slot.get("cpu_s"), format_duration),
        _maybe(slot.get("tasks"), str),
        _maybe(slot.get("oom_kills"), str),
        "-" if expires is None else f"in {format_duration(seconds_until(expires, now))}",
    )


def image_row(image: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of IMAGE_COLUMNS for an image document."""
    return (
        image["name"],
        str(image["digest"]).removeprefix("sha256-")[:12],
        image["launch_now"],
        f"{image['warm']} of {image['wanted']}",
        "yes" if image["default"] else "",
        image["launch_reason"],
    )


def seconds_until(instant: str, now: datetime.datetime) -> float:
    """Seconds from `now` to an RFC 3339 time, negative if it has passed."""
    return (datetime.datetime.fromisoformat(instant.replace("Z", "+00:00")) - now).total_seconds()


def _maybe(value: T | None, form: Callable[[T], str]) -> str:
    return "-" if value is None else form(value)


def _flat(facts: Mapping[str, object], prefix: str) -> Iterable[tuple[str, object]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
