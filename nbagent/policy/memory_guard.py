# SPDX-License-Identifier: BSD-3-Clause
"""The choice of the slots that are held at the memory that they have, because the host's memory runs out. Pure.

More users fit on a host than their limits allow together, so some can take memory that others need. Without a rule the
kernel's OOM killer would end the largest process of any slot. The rule: when the host is short, the slots that grow are
held at what they have and a little more. A kernel that grows on is killed by the limit of its own slot; slots that
do not grow lose nothing. Their limits are restored when the host has memory again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# The host is short when its available memory would be below the reserve after so many seconds of the present decline:
# the time in which the guard samples again and a thousand limits are set. No slot takes more than its limit, so a few
# that grow make no host short that has room for them.
AHEAD_S = 3.0
# A slot grows when it has taken so much in one to two periods; less is the noise of a server at rest.
GROWN_BYTES, PERIOD_S = 2 << 20, 10.0
# Beyond what a held slot has, so that small needs are met: an equal part of a quarter of the available memory.
SLACK_MIN_BYTES, SLACK_MAX_BYTES = 2 << 20, 32 << 20
SLACK_PART = 1 / 4
# Limits are restored while the available memory is above so many reserves.
RESTORE_RESERVES = 2


@dataclass(frozen=True)
class HostMemory:
    """The host in one sample: available memory, its decline since the last sample, and the reserve."""

    available_bytes: int
    decline_bytes_s: float
    reserve_bytes: int


@dataclass(frozen=True)
class SlotMemory:
    """A slot in one sample. `limit_bytes` is its own limit, `held_bytes` the one at which it is held, or None."""

    used_bytes: int
    grown_bytes: int
    limit_bytes: int
    held_bytes: int | None = None

    @property
    def free_bytes(self) -> int:
        """The memory that the slot can still take. An update can set the own limit of a held slot below the other."""
        limit_bytes = self.limit_bytes if self.held_bytes is None else min(self.held_bytes, self.limit_bytes)
        return max(0, limit_bytes - self.used_bytes)


class Growth:
    """How much slots have grown in the last PERIOD_S to twice that, by the memory that they had in earlier samples."""

    def __init__(self) -> None:
        self._base: dict[str, int] = {}
        self._next: dict[str, int] = {}
        self._next_s = -math.inf

    def grown(self, at_s: float, used: Mapping[str, int]) -> dict[str, int]:
        """The growth of each slot in a sample. A slot that was not there before has grown by nothing."""
        if at_s >= self._next_s + PERIOD_S:
            self._base, self._next, self._next_s = self._next, dict(used), at_s
        return {name: size - self._base.get(name, self._next.get(name, size)) for name, size in used.items()}


def decide(host: HostMemory, slots: Mapping[str, SlotMemory]) -> dict[str, int | None]:
    """The limits to set by slot: a number of bytes holds the slot, None restores its own limit."""
    growing = {name: slot for name, slot in slots.items() if slot.grown_bytes >= GROWN_BYTES}
    ahead_bytes = min(max(0.0, host.decline_bytes_s) * AHEAD_S, sum(slot.free_bytes for slot in growing.values()))
    if host.available_bytes - ahead_bytes >= host.reserve_bytes:
        return dict.fromkeys(_restored(host, slots))
    free = {name: slot for name, slot in growing.items() if slot.held_bytes is None}
    share_bytes = round(max(0, host.available_bytes) * SLACK_PART / max(1, len(free)))
    slack_bytes = max(SLACK_MIN_BYTES, min(SLACK_MAX_BYTES, share_bytes))
    # The fastest first, because each limit takes milliseconds to set.
    return {
        name: slot.used_bytes + slack_bytes
        for name, slot in sorted(free.items(), key=lambda item: item[1].grown_bytes, reverse=True)
        if slack_bytes < slot.free_bytes
    }


def _restored(host: HostMemory, slots: Mapping[str, SlotMemory]) -> Iterable[str]:
    """The held slots that could take all of their limit now, those that need least first."""
    spare_bytes = host.available_bytes - RESTORE_RESERVES * host.reserve_bytes
    held = [(slot.limit_bytes - slot.used_bytes, name) for name, slot in slots.items() if slot.held_bytes is not None]
    for need_bytes, name in sorted(held):
        spare_bytes -= need_bytes
        if spare_bytes < 0:
            return
        yield name
