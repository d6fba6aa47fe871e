# SPDX-License-Identifier: BSD-3-Clause
"""A group of asyncio tasks that ends as one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

T = TypeVar("T")


class Tasks:
    """Tasks that run beside the caller. The event loop keeps only weak references to tasks, so they are kept here."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()

    def spawn(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        """Starts a task."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def cancel(self) -> None:
        """Cancels every task and waits for their ends."""
        for task in self._tasks:
            task.cancel()
        await self.finish()

    async def finish(self) -> None:
        """Waits until every task has ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
