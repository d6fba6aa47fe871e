"""All slots of the host, by id, and what is asked of them all at every event: counts, ids and addresses in use.

These are kept as slots come, change and go, so that an event costs the same with ten slots and with thousands.
Whoever changes a slot's state does it by `move`.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from nbagent.core.model import SlotState
from nbagent.supervisor.running_slot import RunningSlot

# Slots' ids within the image's range start here; below are the image's own users.
UID_FIRST, UID_LAST = 2000, 65000


class Slots(Mapping[str, RunningSlot]):
    """The slots that are not gone."""

    def __init__(self) -> None:
        self._lives: dict[str, RunningSlot] = {}
        self._states: Counter[tuple[str, SlotState]] = Counter()
        self._digests: Counter[str] = Counter()
        self._uids: set[tuple[int, int]] = set()
        self.addresses: set[str] = set()

    def __getitem__(self, slot_id: str) -> RunningSlot:
        return self._lives[slot_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lives)

    def __len__(self) -> int:
        return len(self._lives)

    def add(self, live: RunningSlot) -> None:
        """Takes in a slot that is new, or was adopted."""
        slot = live.slot
        self._lives[slot.id] = live
        self._states[slot.image, slot.state] += 1
        self._digests[slot.digest] += 1
        self._uids.add((slot.id_base, slot.uid))
        self.addresses.update(slot.addresses)

    def give(self, live: RunningSlot, addresses: tuple[str, ...]) -> None:
        """Gives a slot its addresses."""
        live.slot = dataclasses.replace(live.slot, addresses=addresses)
        self.addresses.update(addresses)

    def move(self, live: RunningSlot, state: SlotState, **changes: Any) -> None:
        """Changes a slot's state, and what else changes with it. Raises IllegalMove."""
        before = live.slot
        live.slot = before.to(state, **changes)
        self._states[before.image, before.state] -= 1
        self._states[before.image, state] += 1

    def remove(self, live: RunningSlot) -> None:
        """Forgets a slot that is gone."""
        slot = live.slot
        del self._lives[slot.id]
        self._states[slot.image, slot.state] -= 1
        self._digests[slot.digest] -= 1
        self._uids.discard((slot.id_base, slot.uid))
        self.addresses.difference_update(slot.addresses)

    def count(self, state: SlotState, image: str | None = None) -> int:
        """How many are in a state, of one image or of all."""
        if image is not None:
            return self._states[image, state]
        return sum(count for (_, other), count in self._states.items() if other is state)

    def uses(self, digest: str) -> bool:
        """Whether any slot was made of an image's tree."""
        return self._digests[digest] > 0

    def free_uid(self, id_base: int) -> int:
        """An id in an image's range that no slot has."""
        while True:
            uid = UID_FIRST + secrets.randbelow(UID_LAST - UID_FIRST)
            if (id_base, uid) not in self._uids:
                return uid
