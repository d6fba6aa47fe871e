"""Documents of the API for people: tables on a terminal, plain columns in a pipe.

rich is imported only where a terminal shows it.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from nbagent.core.quantities import format_duration, format_size

if TYPE_CHECKING:
    from rich.table import Table

SLOT_COLUMNS = ("SLOT", "STATE", "IMAGE", "AGE", "IDLE", "MEMORY", "CPU", "TASKS", "OOM", "EXPIRES")
IMAGE_COLUMNS = ("NAME", "DIGEST", "LAUNCH", "WARM", "DEFAULT")
_STYLES = {"claimed": "green", "warm": "cyan", "starting": "yellow", "stopping": "dim", "failed": "red"}


def show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; columns of spaces where no terminal is."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(table(columns, rows))
        return
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for cells in (columns, *rows):
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """The same as a rich table, states in colour."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    # Text, since rich would read [brackets] in what it shows as markup.
    drawn = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
    for cells in rows:
        drawn.add_row(*(Text(cell, _STYLES.get(cell, "")) for cell in cells))
    return drawn


def show_facts(facts: Mapping[str, Any]) -> None:
    """Prints names and values, one a line, those of a mapping below its name."""
    for name, value in _flat(facts, ""):
        click.echo(f"{name:28} {'-' if value is None else value}")


def slot_row(slot: Mapping[str, Any], now: datetime.datetime) -> tuple[str, ...]:
    """A slot document as the cells of SLOT_COLUMNS; "-" for what is not known."""
    used, limit = slot.get("memory_bytes"), slot["limits"]["memory_bytes"]
    expires = slot.get("expires_at")
    return (
        slot["slot"],
        slot["state"],
        slot["image"],
        format_duration(slot["age_s"]),
        _maybe(slot.get("idle_s"), format_duration),
        f"{_maybe(used, format_size)} of {format_size(limit)}",
        _maybe(slot.get("cpu_s"), format_duration),
        _maybe(slot.get("tasks"), str),
        _maybe(slot.get("oom_kills"), str),
        "-" if expires is None else f"in {format_duration(seconds_until(expires, now))}",
    )


def image_row(image: Mapping[str, Any]) -> tuple[str, ...]:
    """An image document as the cells of IMAGE_COLUMNS."""
    return (
        image["name"],
        str(image["digest"]).removeprefix("sha256-")[:12],
        image["launch"],
        f"{image['warm']} of {image['wanted']}",
        "yes" if image["default"] else "",
    )


def seconds_until(instant: str, now: datetime.datetime) -> float:
    """From `now` to an RFC 3339 instant, negative when it has passed."""
    return (datetime.datetime.fromisoformat(instant.replace("Z", "+00:00")) - now).total_seconds()


def _maybe(value: Any, form: Any) -> str:
    return "-" if value is None else form(value)


def _flat(facts: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
