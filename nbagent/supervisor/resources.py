# SPDX-License-Identifier: BSD-3-Clause
"""Reports resources of the host that are nearly used up: in /stats and /metrics, and in the journal.

A claim succeeds as long as one is left, so that this is an alarm and no fault: a host is not full, and serves on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence

from nbagent.core import paths
from nbagent.core.events import Event, emit
from nbagent.linux import resources
from nbagent.linux.resources import Kernel, Resource
from nbagent.supervisor.tasks import in_thread

# A resource is reported below the first, and again when it was above the second meanwhile.
LOW_PERCENT, ENOUGH_PERCENT = 5.0, 10.0
PAUSE_S = 5.0


# A directory of each file system, and its name. The supervisor does not see the files of the journal.
_FILE_SYSTEMS = {paths.RUN: paths.RUN, paths.IMAGES: paths.IMAGES, paths.LOGS: paths.LOGS.parent}


def read(kernel: Kernel) -> Iterator[Resource]:
    """The resources that the supervisor sees."""
    for path, name in _FILE_SYSTEMS.items():
        with contextlib.suppress(OSError):
            for found in resources.of_file_system(path):
                yield found._replace(name=f"{found.name} of {name}")
    yield from kernel.read()
    with contextlib.suppress(OSError):
        own = resources.of_process()
        yield own._replace(name=f"{own.name} of the supervisor")


class Resources:
    """The free part of each resource, in percent, at the last check."""

    def __init__(self, read: Callable[[Kernel], Iterator[Resource]] = read) -> None:
        self._read = read
        self.free_percent: dict[str, float] = {}
        self._low: set[str] = set()

    async def run(self) -> None:
        """Checks until cancelled."""
        with Kernel() as kernel:
            while True:
                # In a thread, because a disk may not respond. Without one, the next check tries again.
                with contextlib.suppress(OSError):
                    self.note(await in_thread(lambda: list(self._read(kernel))))
                await asyncio.sleep(PAUSE_S)

    def note(self, found: Sequence[Resource]) -> None:
        """Notes all resources, and reports those that have become low or have enough again."""
        self.free_percent = {resource.name: round(resource.free_percent, 1) for resource in found}
        for resource in found:
            if resource.free_percent < LOW_PERCENT and resource.name not in self._low:
                self._low.add(resource.name)
                emit(Event.RESOURCE_LOW, resource=resource.name, free=resource.free, limit=resource.limit)
            elif resource.free_percent > ENOUGH_PERCENT and resource.name in self._low:
                self._low.discard(resource.name)
                emit(Event.RESOURCE_RESTORED, resource=resource.name, free=resource.free, limit=resource.limit)
