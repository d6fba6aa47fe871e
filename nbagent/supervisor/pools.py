# SPDX-License-Identifier: BSD-3-Clause
"""The pool of each image: its warm slots, the claims that wait for one, and the failures of its starts.

A warm slot has exactly one place: in a pool, or with the claim that took it. Only this module adds slots to a pool and
takes them out.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nbagent.config.host_config import CurrentConfig
from nbagent.core.errors import NbagentError, StartFailed
from nbagent.core.model import SlotState, now
from nbagent.image.store import Image
from nbagent.policy import pool as policy
from nbagent.supervisor.crash_points import Point, reach
from nbagent.supervisor.records import Records
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.slots import Slots
from nbagent.supervisor.zygotes import Zygotes

# Starts that have failed for so long have a cause that lasts longer than the restart of a service.
LASTING_S = 10.0


@dataclass
class ImagePool:
    """The pool of one image. `image` is None when the store no longer has the name."""

    image: Image | None = None
    warm: deque[RunningSlot] = field(default_factory=deque)
    waiting: deque[asyncio.Future[RunningSlot]] = field(default_factory=deque)
    failures: int = 0
    failing_s: float = math.inf
    not_before_s: float = 0.0
    failed_s: float = -math.inf
    last_failure: StartFailed | None = None

    def count_waiting(self) -> int:
        """The claims that wait for a slot."""
        return sum(not claim.done() for claim in self.waiting)

    def next_start_s(self) -> float:
        """When the next start may begin after failed ones: earlier when a claim waits."""
        return min(self.not_before_s, self.failed_s + policy.TRY_S) if self.count_waiting() else self.not_before_s

    def resume(self) -> None:
        """Ends the pause after failed starts."""
        self.failures, self.failing_s, self.not_before_s = 0, math.inf, 0.0

    def refuse(self, error: NbagentError) -> None:
        """Ends the wait of all claims by an error."""
        while self.waiting:
            claim = self.waiting.popleft()
            if not claim.done():
                claim.set_exception(error)


class Pools(Mapping[str, ImagePool]):
    """The pools of the host by image name. `changed` is set when a pool may need a start or has a slot to retire."""

    def __init__(self, config: CurrentConfig, slots: Slots, records: Records, changed: asyncio.Event) -> None:
        self._config = config
        self._slots = slots
        self._records = records
        self._changed = changed
        self._pools: dict[str, ImagePool] = {}

    def __getitem__(self, image: str) -> ImagePool:
        return self._pools[image]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pools)

    def __len__(self) -> int:
        return len(self._pools)

    # Images

    def set_images(self, images: Mapping[str, Image]) -> None:
        """Gives each pool the image that its name means now. A replaced image may start at once."""
        for name in self._pools.keys() - images.keys():
            # Slots keep the pool of a removed image until the last has ended.
            if not self._slots.counts(name) and not self._pools[name].count_waiting():
                del self._pools[name]
        for name in images.keys() | self._pools.keys():
            pool = self._pools.setdefault(name, ImagePool())
            if pool.image != images.get(name):
                pool.resume()
            pool.image = images.get(name)

    def wanted(self, image: str) -> int:
        """How many warm slots of an image are kept; 0 when the store no longer has it."""
        return self._config.value.warm(image) if self._pools[image].image is not None else 0

    def digests(self) -> set[str]:
        """The digests of the images that slots are started from."""
        return {pool.image.digest for pool in self._pools.values() if pool.image is not None}

    # Slots

    def adopt(self, live: RunningSlot) -> None:
        """Adds a slot of a former supervisor to the pool of its image; a claimed one only makes sure of the pool."""
        pool = self._pools.setdefault(live.slot.image, ImagePool())
        if live.slot.state is SlotState.WARM:
            pool.warm.append(live)

    def offer(self, live: RunningSlot) -> None:
        """Gives a warm slot to the claim that has waited longest, or adds it to the pool."""
        if live.slot.state is not SlotState.WARM:
            return
        pool = self._pools[live.slot.image]
        while pool.waiting:
            claim = pool.waiting.popleft()
            if not claim.done():
                claim.set_result(live)
                return
        # Persist only now: until then a restart must discard the slot.
        self._records.save(live.slot)
        reach(Point.WARM_RECORDED)
        pool.warm.append(live)
        self._changed.set()

    def _offer_again(self, live: RunningSlot) -> None:
        try:
            self.offer(live)
        except OSError:  # no record can be written; a restart discards the slot, which is warm until then
            self._pools[live.slot.image].warm.append(live)

    def take(self, image: str) -> RunningSlot | None:
        """Takes the oldest warm slot out of a pool."""
        warm = self._pools[image].warm
        return warm.popleft() if warm else None

    async def wait(self, image: str, timeout_s: float) -> RunningSlot:
        """The next slot that is offered to a pool, in the order of the calls.

        Raises the error by which claims that wait are refused; after `timeout_s` StartFailed if the last start has
        failed, and else TimeoutError.
        """
        waiter: asyncio.Future[RunningSlot] = asyncio.get_running_loop().create_future()
        self._pools[image].waiting.append(waiter)
        self._changed.set()
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter
        except TimeoutError:
            if (live := _given(waiter)) is not None:
                return live
            pool = self._pools.get(image)  # None when the image was removed meanwhile
            if pool is not None and pool.failures and pool.last_failure is not None:
                raise pool.last_failure from None
            raise
        except asyncio.CancelledError:
            if (live := _given(waiter)) is not None:
                self._offer_again(live)
            raise
        finally:
            waiter.cancel()

    def remove(self, live: RunningSlot) -> None:
        """Removes a slot that ends from its pool, if it is there."""
        warm = self._pools[live.slot.image].warm
        if live in warm:
            warm.remove(live)

    def warm_slots(self) -> list[RunningSlot]:
        """The warm slots of all pools that no claim has taken."""
        return [live for pool in self._pools.values() for live in pool.warm]

    # Starts

    def start_failed(self, image: str, error: StartFailed) -> float:
        """Counts a failed start; returns the seconds for which the pool pauses.

        Claims that wait are refused when starts have failed for LASTING_S, so that their callers try another host.
        """
        pool, settings = self._pools[image], self._config.value.pool
        pool.failures += 1
        pool.last_failure = error
        wait_s = policy.backoff(pool.failures, settings.backoff, settings.backoff_max)
        pool.failed_s = now()
        pool.not_before_s = pool.failed_s + wait_s
        pool.failing_s = min(pool.failing_s, pool.failed_s)
        if pool.failed_s - pool.failing_s >= LASTING_S:
            pool.refuse(error)
        return wait_s

    def refuse(self, error: NbagentError) -> None:
        """Ends the wait of all claims of all pools by an error."""
        for pool in self._pools.values():
            pool.refuse(error)

    def resume(self) -> None:
        """Ends all pauses, because their cause may be mended."""
        for pool in self._pools.values():
            pool.resume()

    def next_start_s(self, at_s: float, latest_s: float) -> float:
        """The end of the first pause that had not ended at `at_s`, at most `latest_s`."""
        starts = (pool.next_start_s() for pool in self._pools.values())
        return min([latest_s, *(start_s for start_s in starts if start_s > at_s)])

    def snapshot(self, zygotes: Zygotes) -> list[policy.Pool]:
        """The pools as the policy takes them."""
        at_s = now()
        return [
            policy.Pool(
                image=name,
                digest=pool.image.digest if pool.image else None,
                launch=zygotes.launch(name),
                launch_reason=zygotes.reason(name),
                warming=zygotes.is_warming(name),
                wanted=self.wanted(name),
                warm=[live.slot for live in pool.warm],
                starting=self._slots.count(SlotState.STARTING, name),
                waiting=pool.count_waiting(),
                paused_s=pool.not_before_s - at_s,
                failed_ago_s=at_s - pool.failed_s,
            )
            for name, pool in self._pools.items()
        ]


def _given(waiter: asyncio.Future[RunningSlot]) -> RunningSlot | None:
    """The slot that a wait was given although it ended otherwise: in one turn of the event loop a slot can be offered,
    and then the wait can time out or be cancelled. No other object has this slot.
    """
    return None if not waiter.done() or waiter.cancelled() or waiter.exception() is not None else waiter.result()
