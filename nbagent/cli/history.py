# SPDX-License-Identifier: BSD-3-Clause
"""`nbagent history`: what happened to slots, from the supervisor's entries in the journal.

Only entries of nbagent.service are read, because any user of the host may write entries with the same fields.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nbagent.core.errors import ConfigError
from nbagent.core.events import Event
from nbagent.core.quantities import format_duration, format_size

COLUMNS = ("SLOT", "IMAGE", "CLAIMED", "CLIENT", "FOR", "LIMIT", "PEAK", "CPU", "OOM", "END")
SUPERVISOR = "nbagent.service"
_BY_ID = {event.value.message_id: event for event in Event}
# The events that end a slot, with the words before their text.
_ENDS = {
    Event.SLOT_RELEASED: "released by",
    Event.SLOT_CULLED: "culled:",
    Event.SLOT_RETIRED: "retired:",
    Event.SLOT_RETURNED: "lent only:",
    Event.SLOT_FAILED: "did not start:",
    Event.SLOT_DIED: "ended unexpectedly:",
    Event.SLOT_NOT_PREPARED: "content or network failed:",
    Event.SLOT_REMOVED: "removed by the next supervisor:",
}


HOST_ENDED = "its host was shut down or failed"


class Entry(NamedTuple):
    """One entry of the journal about a slot. `facts` has its NBAGENT_ fields by lower-case name."""

    at: datetime.datetime
    event: Event
    facts: Mapping[str, str]
    message: str
    boot_id: str


@dataclass
class History:
    """The facts that the journal has about one slot; None where it has none."""

    slot: str
    image: str | None = None
    started_at: datetime.datetime | None = None
    claimed_at: datetime.datetime | None = None
    client: str | None = None
    limits: dict[str, float | int | None] | None = None
    network: str | None = None
    ttl_s: float | None = None
    changes: list[dict[str, str]] = field(default_factory=list)
    ended_at: datetime.datetime | None = None
    end: str | None = None
    peak_bytes: int | None = None
    cpu_s: int | None = None
    oom_kills: int = 0
    boot_id: str = ""
    events: list[dict[str, str]] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        """Adds the next entry."""
        facts, self.boot_id = entry.facts, entry.boot_id
        self.events.append({"at": _time(entry.at), "event": entry.event.name.lower(), "text": entry.message})
        self.image = facts.get("image", self.image)
        if entry.event is Event.SLOT_STARTING:
            self.started_at = entry.at
        elif entry.event is Event.SLOT_CLAIMED:
            self.claimed_at, self.client, self.network = entry.at, facts["client"], facts.get("network")
            self.ttl_s = _number(facts.get("ttl_s"))
            if "memory_bytes" in facts:
                names = ("memory_bytes", "cpu_weight", "cpu_quota", "tasks")
                self.limits = {name: _number(facts.get(name)) for name in names}
        elif entry.event is Event.SLOT_UPDATED:
            client = facts.get("client", "unknown")
            self.changes.append({"at": _time(entry.at), "client": client, "text": facts.get("text", "")})
        elif entry.event is Event.SLOT_OOM:
            self.oom_kills += int(_number(facts.get("kills")) or 1)
        elif entry.event is Event.SLOT_GONE:
            self.ended_at = entry.at
            peak, cpu, kills = (_number(facts.get(name)) for name in ("peak_bytes", "cpu_s", "oom_kills"))
            self.peak_bytes, self.cpu_s = None if peak is None else int(peak), None if cpu is None else int(cpu)
            self.oom_kills = max(self.oom_kills, int(kills or 0))
        if entry.event in _ENDS:
            self.end = f"{_ENDS[entry.event]} {facts.get('client') or facts.get('text', '')}".strip()
            self.ended_at = entry.at

    def document(self) -> dict[str, object]:
        """The history as JSON."""
        return {name: _time(value) if isinstance(value, datetime.datetime) else value
                for name, value in vars(self).items()}

    def row(self, now: datetime.datetime) -> tuple[str, ...]:
        """The cells of COLUMNS."""
        lived = None if self.claimed_at is None else ((self.ended_at or now) - self.claimed_at).total_seconds()
        memory = (self.limits or {}).get("memory_bytes")
        return (
            self.slot,
            self.image or "-",
            "-" if self.claimed_at is None else f"{self.claimed_at:%m-%d %H:%M:%S}",
            self.client or "-",
            "-" if lived is None else format_duration(lived),
            "-" if memory is None else format_size(int(memory)),
            "-" if not self.peak_bytes else format_size(self.peak_bytes),
            "-" if self.cpu_s is None else format_duration(self.cpu_s),
            str(self.oom_kills),
            self.end or "runs",
        )


def collect(entries: Iterable[Entry]) -> dict[str, History]:
    """The histories of all slots in these entries, by slot."""
    found: dict[str, History] = {}
    for entry in entries:
        slot = entry.facts["slot"]
        found.setdefault(slot, History(slot)).add(entry)
    return found


def of_slot(slot: str) -> History | None:
    """The history of a slot; None when the journal has no entry about it. Raises ConfigError."""
    found = collect(read(slot=slot)).get(slot)
    if found is not None:
        _end_with_boots([found])
    return found


def since(start: datetime.datetime) -> list[History]:
    """The histories of the slots with an entry since then, from their first entry on. Raises ConfigError."""
    found = collect(read(start=start))
    for slot, history in found.items():
        if history.started_at is None:
            found[slot] = of_slot(slot) or history
    _end_with_boots(found.values())
    return sorted(found.values(), key=lambda history: history.events[0]["at"])


def _end_with_boots(histories: Iterable[History]) -> None:
    """Ends the slots that ran at the end of a former boot: at the time of its last entry, of whatever program.

    systemd ends slots at a shutdown after the supervisor has ended, and a host can fail: then no entry has their end.
    """
    from systemd import id128

    this_boot, ends = id128.get_boot().hex, dict[str, datetime.datetime | None]()
    for history in histories:
        boot_id = history.boot_id
        if history.ended_at is None and boot_id and boot_id != this_boot:
            if boot_id not in ends:
                ends[boot_id] = _last_of(boot_id)
            history.end, history.ended_at = HOST_ENDED, ends[boot_id]


def _last_of(boot_id: str) -> datetime.datetime | None:
    """The time of the last entry of a boot."""
    from systemd import journal

    with journal.Reader() as reader:
        reader.add_match(_BOOT_ID=boot_id)
        reader.seek_tail()
        return _at(fields) if (fields := reader.get_previous()) else None


def read(slot: str | None = None, start: datetime.datetime | None = None) -> Iterator[Entry]:
    """The supervisor's entries about slots, in the order of the journal. Raises ConfigError without python3-systemd."""
    try:
        from systemd import journal
    except ImportError:
        raise ConfigError("the journal cannot be read: the package python3-systemd is not installed") from None
    with journal.Reader() as reader:
        reader.add_match(_SYSTEMD_UNIT=SUPERVISOR)
        if slot is not None:
            reader.add_match(NBAGENT_SLOT=slot)
        if start is not None:
            reader.seek_realtime(start.timestamp())
        for fields in reader:
            if (entry := _entry(fields)) is not None:
                yield entry


def _entry(fields: Mapping[str, Any]) -> Entry | None:
    event = _BY_ID.get(str(fields.get("MESSAGE_ID", "")).replace("-", ""))
    if event is None or "NBAGENT_SLOT" not in fields:
        return None
    facts = {
        name.removeprefix("NBAGENT_").lower(): str(value) for name, value in fields.items()
        if name.startswith("NBAGENT_")
    }
    boot_id = str(fields.get("_BOOT_ID", "")).replace("-", "")
    return Entry(_at(fields), event, facts, str(fields.get("MESSAGE", "")), boot_id)


def _at(fields: Mapping[str, Any]) -> datetime.datetime:
    at: datetime.datetime = fields["__REALTIME_TIMESTAMP"]
    return at.astimezone(datetime.UTC)


def _number(text: str | None) -> float | int | None:
    """A number in a field; None for "None", which is a limit that is not set."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return int(value) if value.is_integer() else value


def _time(at: datetime.datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")
