# SPDX-License-Identifier: BSD-3-Clause
"""The slots of a host: counts, ids and addresses in use follow every move of a slot."""

import dataclasses

import pytest

from nbagent.core.errors import IllegalMove
from nbagent.core.model import Limits, Slot, SlotState
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.slots import Slots

SLOT = Slot(
    id="h-1", image="minimal", digest="d1", id_base=1 << 20, uid=2000, state=SlotState.STARTING,
    limits=Limits(1 << 30, 100, None, 256), token="t", created_s=1.0,
)


def a_live(name, **changes):
    return RunningSlot(dataclasses.replace(SLOT, id=name, **changes))


def test_counts_follow_the_moves_of_a_slot():
    slots = Slots()
    first, second = a_live("h-1"), a_live("h-2", image="other", digest="d2")
    slots.add(first)
    slots.add(second)
    assert slots.count(SlotState.STARTING) == 2 and slots.count(SlotState.STARTING, "minimal") == 1
    slots.move(first, SlotState.WARM)
    slots.move(first, SlotState.CLAIMED, claimed_s=2.0)
    assert (slots.count(SlotState.STARTING), slots.count(SlotState.WARM), slots.count(SlotState.CLAIMED)) == (1, 0, 1)
    assert first.slot.claimed_s == 2.0 and slots["h-1"] is first and len(slots) == 2
    for state in (SlotState.STOPPING, SlotState.GONE):
        slots.move(first, state)
    slots.remove(first)
    assert list(slots) == ["h-2"] and not slots.uses("d1") and slots.uses("d2")
    assert not any(slots.count(state, "minimal") for state in SlotState)


def test_an_illegal_move_changes_no_count():
    slots, live = Slots(), a_live("h-1")
    slots.add(live)
    with pytest.raises(IllegalMove):
        slots.move(live, SlotState.CLAIMED)
    assert slots.count(SlotState.STARTING) == 1 and slots.count(SlotState.CLAIMED) == 0


def test_the_user_id_and_addresses_of_a_removed_slot_are_free(monkeypatch):
    numbers = iter([0, 1, 0])
    monkeypatch.setattr("secrets.randbelow", lambda _: next(numbers))
    slots, live = Slots(), a_live("h-1")
    slots.add(live)
    slots.set_addresses(live, ("198.18.0.2",))
    assert "198.18.0.2" in slots.addresses and live.slot.addresses == ("198.18.0.2",)
    # 2000 is taken in the range of this image, and free in that of another.
    assert slots.free_uid(SLOT.id_base) == 2001
    assert slots.free_uid(SLOT.id_base * 2) == 2000
    slots.remove(live)
    assert not slots.addresses
