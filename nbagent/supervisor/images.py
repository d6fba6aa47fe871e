# SPDX-License-Identifier: BSD-3-Clause
"""The images of the store as the pools and zygotes use them."""

from __future__ import annotations

import asyncio
import contextlib

from nbagent.core.events import Event, emit
from nbagent.image.store import ImageStore
from nbagent.supervisor.crash_points import Point, reach
from nbagent.supervisor.pools import Pools
from nbagent.supervisor.slots import Slots
from nbagent.supervisor.systemd import JobFailed, Systemd
from nbagent.supervisor.tasks import Tasks
from nbagent.supervisor.zygotes import Zygotes

# Deletes retired trees, because their files belong to ids of images, and only root with CAP_DAC_OVERRIDE can do that.
SWEEP_UNIT = "nbagent-sweep.service"
# From an error of the store to the next refresh.
AGAIN_S = 30.0


class Images:
    """Brings pools and zygotes up to date with the store, and removes image trees that are no longer in use."""

    def __init__(
        self, store: ImageStore, slots: Slots, pools: Pools, zygotes: Zygotes, systemd: Systemd, tasks: Tasks,
        changed: asyncio.Event,
    ) -> None:
        self._store = store
        self._slots = slots
        self._pools = pools
        self._zygotes = zygotes
        self._tasks = tasks
        self._changed = changed
        self._systemd = systemd
        # A start of the unit while it runs would miss trees that were retired meanwhile.
        self._sweeping = asyncio.Lock()
        # The images that the last refresh could not read, with the reason.
        self._skipped: dict[str, str] = {}
        self._again: asyncio.TimerHandle | None = None

    def refresh(self) -> None:
        """Reads the store: each image has a pool, and a zygote where its slots are forked.

        An error of the disk concerns nothing but the images that cannot be read, or that cannot be removed, and is
        followed by another refresh.
        """
        errors: dict[str, Exception] = {}
        images = {image.name: image for image in self._store.list(errors.__setitem__)}
        self._note_skipped({name: str(error) for name, error in errors.items()})
        self._pools.set_images(images)
        reach(Point.IMAGE_REPLACED)
        self._zygotes.want(images)
        if not self._retire() or any(isinstance(error, OSError) for error in errors.values()):
            self._refresh_again()
        self._changed.set()

    def _note_skipped(self, skipped: dict[str, str]) -> None:
        for name, text in skipped.items():
            if self._skipped.get(name) != text:
                emit(Event.IMAGE_UNREADABLE, image=name, text=text)
        self._skipped = skipped

    def _retire(self) -> bool:
        """Removes the trees that are no longer in use; returns whether the store has done it."""
        # A slot that starts uses the image of its pool, even when the name means another image by then.
        slots = {live.slot.digest for live in self._slots.values()}
        try:
            retired = self._store.retire(self._pools.digests() | slots | self._zygotes.digests())
        except OSError:  # the file system is read-only, for example, or another process changes the store
            return False
        self._tasks.spawn(self._sweep(retired))
        return True

    def _refresh_again(self) -> None:
        def again() -> None:
            self._again = None
            self.refresh()

        if self._again is None:
            self._again = asyncio.get_running_loop().call_later(AGAIN_S, again)

    def slot_removed(self, digest: str) -> None:
        """Refreshes when the slot that was removed was the last on an image that has been replaced."""
        if digest not in self._pools.digests() and not self._slots.uses(digest):
            self.refresh()

    async def _sweep(self, retired: list[str]) -> None:
        async with self._sweeping:
            if self._store.has_retired():
                # The next refresh tries again.
                with contextlib.suppress(OSError, JobFailed):
                    await self._systemd.start(SWEEP_UNIT)
        for digest in retired:
            emit(Event.IMAGE_REMOVED, digest=digest)
