# SPDX-License-Identifier: BSD-3-Clause
"""The choice of the slots that give way, because they compute while no processor of the host is free. Pure.

A slot that computes for long does not notice a delay of milliseconds, and one whose user has just run a cell does.
The kernel divides processors by CPU weight, so with equal weights a woken cell waits while others compute. The rule: a
slot that has used about a second of processor time while no processor was free has a fraction of its weight until it
rests. A weight limits nothing while a processor is free, so such a slot loses no time then.

The use of a slot is a leaky bucket: it fills with processor time and leaks at a rate that interactive work does not
exceed. Where many slots compute, each gets little of the processors, so the rate is at most half of an equal share.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

# No processor is free when all together were idle for less than this, in processors, because each is then busy for a
# part of the time and a woken task can meet a running one on each: one, or half of one where there is only one, or this
# part of many.
FREE_PROCESSORS, FREE_PART_OF_ONE, FREE_PART = 1.0, 1 / 2, 1 / 50
# The use of all slots is followed for so long after no processor was free.
FOLLOW_S = 2.0
# The content of a bucket, in seconds of processor time, at which its slot gives way.
FULL_S = 1.0
# The leak in processors. A cell a second is a hundredth of a processor, and an idle server a thousandth.
LEAK = 0.1
# A slot rests when it has used less than half the leak for so long.
REST_S, REST_PART = 1.0, 1 / 2
# A slot that used less than this at the last reading is read once in so many seconds.
CALM, CALM_S = REST_PART * LEAK, 1.0
# The content of the bucket of a slot that rested: it gives way sooner than one that never did.
RESTED_S = FULL_S / 2


def sharers(used: Iterable[float]) -> float:
    """The number of slots that share the processors: N when N use the same, and less for each that uses less (the
    inverse of Simpson's index).
    """
    parts = list(used)
    squares = sum(part * part for part in parts)
    return sum(parts) ** 2 / squares if squares else 1.0


class _Read(NamedTuple):
    """The processor time of a slot in one sample, and the processors that it used since the reading before."""

    at_s: float
    used_s: float
    part: float = 0.0
    is_first: bool = False


class Processors:
    """The processors of a host and what its slots used of them, by samples a fraction of a second apart.

    For each sample `sample` is called first, then `due` and `decide`.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._sampled_s: float | None = None
        self._idle_s = 0.0
        self._past_s = 0.0
        self._busy_s: float | None = None
        self._busy = False
        # By slot: the last reading, the content of the bucket, and the time since which it rests.
        self._reads: dict[str, _Read] = {}
        self._content_s: dict[str, float] = {}
        self._rests_s: dict[str, float] = {}

    def sample(self, at_s: float, idle_s: float) -> bool:
        """Begins a sample, and returns whether the use of all slots is followed, or only that of those that give way.

        `idle_s` is that of all processors together since the boot.
        """
        self._past_s = 0.0 if self._sampled_s is None else at_s - self._sampled_s
        free = (idle_s - self._idle_s) / self._past_s if self._past_s > 0 else self._count
        self._busy = free < max(min(FREE_PROCESSORS, FREE_PART_OF_ONE * self._count), FREE_PART * self._count)
        self._sampled_s, self._idle_s = at_s, idle_s
        if self._busy:
            self._busy_s = at_s
        return self._busy_s is not None and at_s - self._busy_s <= FOLLOW_S

    def due(self, names: Iterable[str], giving: Collection[str]) -> list[str]:
        """Those of the slots that are followed whose use `decide` needs for this sample."""
        latest_s = (self._sampled_s or 0.0) - CALM_S
        return [
            name for name in names
            if name in giving or (read := self._reads.get(name)) is None
            or read.is_first or read.part >= CALM or read.at_s <= latest_s
        ]

    def decide(self, used_s: Mapping[str, float], giving: Collection[str]) -> dict[str, bool]:
        """The changes by slot: True when it has to give way, False when it has rested.

        `used_s` is the processor time of slots since their start, `giving` has those that give way.
        """
        if self._past_s <= 0:
            return {}
        at_s = self._sampled_s or 0.0
        before = {name: read for name, read in self._reads.items() if at_s - read.at_s <= FOLLOW_S}
        grown_s = {name: max(0.0, size_s - before[name].used_s) for name, size_s in used_s.items() if name in before}
        self._reads = before | {
            name: _Read(at_s, size_s, grown_s[name] / (at_s - before[name].at_s)) if name in grown_s
            else _Read(at_s, size_s, is_first=True)
            for name, size_s in used_s.items()
        }
        leak = LEAK
        if self._busy:
            leak = min(LEAK, self._count / 2 / sharers(read.part for read in self._reads.values()))
        self._fill(grown_s, leak)
        return dict(self._changes(grown_s, leak, giving))

    def _fill(self, grown_s: Mapping[str, float], leak: float) -> None:
        """Only time in which no processor was free fills the buckets."""
        more_s = grown_s if self._busy else {}
        content_s = {
            name: min(FULL_S, self._content_s.get(name, 0.0) + more_s.get(name, 0.0) - leak * self._past_s)
            for name in {*more_s, *self._content_s}
        }
        self._content_s = {name: size_s for name, size_s in content_s.items() if size_s > 0}

    def _changes(
        self, grown_s: Mapping[str, float], leak: float, giving: Collection[str]
    ) -> Iterator[tuple[str, bool]]:
        at_s, rests_s = self._sampled_s or 0.0, self._rests_s
        self._rests_s = {
            name: rests_s.get(name, at_s - self._past_s)
            for name in giving if name in grown_s and self._reads[name].part < REST_PART * leak
        }
        for name, since_s in self._rests_s.items():
            if at_s - since_s >= REST_S:
                self._content_s[name] = RESTED_S
                yield name, False
        # Those that use most first, because each change takes milliseconds.
        for name in sorted(grown_s, key=lambda name: self._reads[name].part, reverse=True):
            if name not in giving and self._busy and self._content_s.get(name, 0.0) >= FULL_S:
                yield name, True
