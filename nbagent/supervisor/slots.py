# SPDX-License-Identifier: BSD-3-Clause
"""All slots of the host by id, and indexes of them: counts by state and image, ids and addresses in use, claims by key.

The indexes are updated at each change of a slot, so that an event costs the same with ten slots and with thousands.
Therefore a slot's state is changed by `move` alone.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from nbagent.core.model import SlotState
from nbagent.supervisor.running_slot import RunningSlot

# User ids of slots within the range of an image; those below are the users of the image itself.
UID_FIRST, UID_LAST = 2000, 65000


class Slots(Mapping[str, RunningSlot]):
    """The slots that have not been removed."""

    def __init__(self) -> None:
        self._lives: dict[str, RunningSlot] = {}
        self._states: Counter[tuple[str, SlotState]] = Counter()
        self._digests: Counter[str] = Counter()
        self._uids: set[tuple[int, int]] = set()
        self._keys: dict[str, RunningSlot] = {}
        self.addresses: set[str] = set()

    def __getitem__(self, slot_id: str) -> RunningSlot:
        return self._lives[slot_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lives)

    def __len__(self) -> int:
        return len(self._lives)

    def add(self, live: RunningSlot) -> None:
        """Adds a slot that is new or adopted."""
        slot = live.slot
        self._lives[slot.id] = live
        self._states[slot.image, slot.state] += 1
        self._digests[slot.digest] += 1
        self._uids.add((slot.id_base, slot.uid))
        self.addresses.update(slot.addresses)
        self._index_key(live)

    def set_addresses(self, live: RunningSlot, addresses: tuple[str, ...]) -> None:
        """Gives a slot its addresses."""
        live.slot = dataclasses.replace(live.slot, addresses=addresses)
        self.addresses.update(addresses)

    def move(self, live: RunningSlot, state: SlotState, **changes: Any) -> None:
        """Changes a slot's state, and other fields with it. Raises IllegalMove."""
        before = live.slot
        live.slot = before.to(state, **changes)
        self._states[before.image, before.state] -= 1
        self._states[before.image, state] += 1
        self._index_key(live)

    def _index_key(self, live: RunningSlot) -> None:
        key = live.slot.key
        if key is None:
            return
        if live.slot.state is SlotState.CLAIMED:
            self._keys[key] = live
        elif self._keys.get(key) is live:
            del self._keys[key]

    def remove(self, live: RunningSlot) -> None:
        """Removes a slot whose processes have ended."""
        slot = live.slot
        del self._lives[slot.id]
        self._states[slot.image, slot.state] -= 1
        self._digests[slot.digest] -= 1
        self._uids.discard((slot.id_base, slot.uid))
        self.addresses.difference_update(slot.addresses)

    def claimed_by_key(self, key: str) -> RunningSlot | None:
        """The claimed slot of an Idempotency-Key."""
        return self._keys.get(key)

    def count_by_image(self, state: SlotState) -> Mapping[str, int]:
        """How many slots of each image are in a state."""
        return {image: count for (image, other), count in self._states.items() if other is state and count}

    def count(self, state: SlotState, image: str | None = None) -> int:
        """How many slots are in a state, of one image or of all."""
        if image is not None:
            return self._states[image, state]
        return sum(count for (_, other), count in self._states.items() if other is state)

    def counts(self, image: str) -> bool:
        """Whether any slot has an image of this name."""
        return any(count for (other, _), count in self._states.items() if other == image)

    def uses(self, digest: str) -> bool:
        """Whether any slot runs on an image."""
        return self._digests[digest] > 0

    def free_uid(self, id_base: int) -> int:
        """A user id in the range of an image that no slot has."""
        while True:
            uid = UID_FIRST + secrets.randbelow(UID_LAST - UID_FIRST)
            if (id_base, uid) not in self._uids:
                return uid
