# SPDX-License-Identifier: BSD-3-Clause
"""The end of a session for the page that shows it: a file for each claimed slot, also after its end, with the reason.

    /run/nbagent/sessions/SLOT.json     served by the router as /user/SLOT/nbagent/session

The router reads files, so that a page gets its answer while the supervisor or the API restarts. A file has no secret,
because each client that knows a slot's id may read it. The last files of ended slots are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from nbagent.core.model import Slot, SlotState, now, wall

ENDED_MAX = 500
# The wall clock is compared with the time since boot so often; a step by more than this makes the files wrong.
CLOCK_READ_S, CLOCK_STEP_S = 5.0, 1.0
_CLAIMED, _ENDED = "claimed", "ended"
LOST = "its processes ended"
SHUTDOWN = "its host shuts down"


class Sessions:
    """The files of one directory. A file that cannot be written is left out, because no slot depends on it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # The names of ended slots, the oldest first.
        self._ended: deque[str] = deque()
        self._booted_s = _booted_s()
        self._host_stops = False

    async def follow_clock(self, slots: Callable[[], Iterable[Slot]]) -> None:
        """Looks for steps of the wall clock until cancelled."""
        while True:
            await asyncio.sleep(CLOCK_READ_S)
            self.review(slots())

    def review(self, slots: Iterable[Slot]) -> None:
        """Writes the files of claimed slots again if the wall clock was set, because they have wall times."""
        booted_s = _booted_s()
        if abs(booted_s - self._booted_s) < CLOCK_STEP_S:
            return
        self._booted_s = booted_s
        for slot in slots:
            self.claimed(slot)

    def open(self, live: dict[str, Slot]) -> None:
        """Reads the files of a former supervisor. `live` are the slots that it left, by id."""
        self._path.mkdir(mode=0o711, exist_ok=True)
        for file in sorted(self._path.glob("*.json"), key=_changed_s):
            name = file.stem
            if name in live:
                continue
            try:
                is_ended = json.loads(file.read_text())["state"] == _ENDED
            except (OSError, ValueError, KeyError, TypeError):
                is_ended = False
            if is_ended:
                self._keep(name)
            else:
                self._note_end(name, LOST)
        for slot in live.values():
            self.claimed(slot)

    def claimed(self, slot: Slot) -> None:
        """Writes the life of a slot, if it is claimed."""
        if slot.state is SlotState.CLAIMED:
            self._write(slot.id, {
                "slot": slot.id, "state": _CLAIMED, "claimed_at": wall(slot.claimed_s),
                "expires_at": wall(slot.expires_s),
            })

    def ended(self, slot: Slot, reason: str) -> None:
        """Writes the end of a slot, if it was claimed."""
        if slot.claimed_s is not None:
            self._note_end(slot.id, SHUTDOWN if self._host_stops else reason)

    def host_stops(self, slots: Iterable[Slot]) -> None:
        """Writes the end of claimed slots, which systemd ends at the same time as the supervisor, before the router."""
        self._host_stops = True
        for slot in slots:
            if slot.state is SlotState.CLAIMED:
                self._write_end(slot.id, SHUTDOWN)

    def _note_end(self, name: str, reason: str) -> None:
        self._write_end(name, reason)
        self._keep(name)

    def _write_end(self, name: str, reason: str) -> None:
        self._write(name, {"slot": name, "state": _ENDED, "ended_at": wall(now()), "reason": reason})

    def _keep(self, name: str) -> None:
        self._ended.append(name)
        while len(self._ended) > ENDED_MAX:
            with contextlib.suppress(OSError):
                (self._path / f"{self._ended.popleft()}.json").unlink(missing_ok=True)

    def _write(self, name: str, document: dict[str, object]) -> None:
        file = f"{self._path}/{name}.json"
        with contextlib.suppress(OSError):
            fd = os.open(f"{file}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
            with open(fd, "wb", buffering=0) as stream:
                stream.write(json.dumps(document).encode() + b"\n")
            os.rename(f"{file}.new", file)


def _booted_s() -> float:
    """The wall time of the host's boot, by its clock now."""
    return time.time() - now()


def _changed_s(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
