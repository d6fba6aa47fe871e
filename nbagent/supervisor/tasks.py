# SPDX-License-Identifier: BSD-3-Clause
"""A group of asyncio tasks that ends as one.

No caller awaits these tasks, so an exception that ends one is reported here, at once: asyncio itself reports it when
the task is collected, which is never as long as an object refers to the task.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
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
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            task.get_loop().call_exception_handler(
                {"message": f"unexpected error in {task.get_coro()!r}", "exception": error, "task": task}
            )

    async def cancel(self) -> None:
        """Cancels every task and waits for their ends."""
        for task in self._tasks:
            task.cancel()
        await self.finish()

    async def finish(self) -> None:
        """Waits until every task has ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def in_thread(work: Callable[[], T]) -> T:
    """The result of `work`, which can block. Raises OSError when no thread can be started, because process ids or tasks
    are used up; a thread that ends other work can nevertheless do this one later.
    """
    try:
        running = asyncio.get_running_loop().run_in_executor(None, work)
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from error
    return await running
