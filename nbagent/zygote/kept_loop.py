# SPDX-License-Identifier: BSD-3-Clause
"""The event loop of a server that is initialised in a zygote and runs in its forks.

Extensions schedule callbacks, timers and tasks when they are loaded, and keep the loop itself. So each fork runs the
same loop object, with descriptors of its own: `release` closes those of the zygote, which all forks would share, and
`restore` opens new ones. Callbacks run after the server has begun to serve, and a timer after the time that is left
since the zygote was made, as if the server had just started. An exception are those that `run` runs in the zygote.

It works with asyncio's own selector loop; for any other, `restore` gives a new loop, without what was scheduled.
Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import selectors
from typing import Any, List, Tuple


class KeptLoop:
    """The loop of this object's making, which is the current one and does not run."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._kept = isinstance(loop, asyncio.SelectorEventLoop) and all(
            hasattr(loop, name) for name in ("_ready", "_scheduled", "_close_self_pipe", "_make_self_pipe", "_selector")
        )
        self._released_s = 0.0

    def run(self, modules: Tuple[str, ...], timeout_s: float) -> List[Exception]:
        """Runs the coroutine functions of `modules` that are scheduled, and nothing else; returns what they raised.

        One that fails, or takes longer than `timeout_s`, stays scheduled, so that forks run it.
        """
        if not self._kept:
            return []
        loop, errors = self._loop, []
        kept = (loop._ready, loop._scheduled)
        for queue in kept:
            for handle in list(queue):
                call = _scheduled_call(handle)
                if getattr(call.func, "__module__", None) not in modules or not asyncio.iscoroutinefunction(call.func):
                    continue
                loop._ready, loop._scheduled = type(loop._ready)(), []
                try:
                    loop.run_until_complete(asyncio.wait_for(call(), timeout_s))
                    queue.remove(handle)
                except Exception as error:
                    errors.append(error)
                # The callbacks that it has scheduled itself.
                kept[0].extend(loop._ready)
                kept[1].extend(timer for timer in loop._scheduled if not timer.cancelled())
        heapq.heapify(kept[1])
        loop._ready, loop._scheduled = kept
        return errors

    def release(self) -> None:
        """Closes the loop's descriptors, in the zygote."""
        if not self._kept:
            self._loop.close()
        else:
            executor, self._loop._default_executor = self._loop._default_executor, None
            if executor is not None:
                executor.shutdown(wait=True)
            self._loop._close_self_pipe()
            self._loop._selector.close()
            self._loop._selector = None
            self._released_s = self._loop.time()
        asyncio.set_event_loop(None)

    def restore(self) -> bool:
        """Makes the loop current in a fork, and usable; whether it is the same loop."""
        if not self._kept:
            asyncio.set_event_loop(asyncio.new_event_loop())
            return False
        loop = self._loop
        loop._selector = selectors.DefaultSelector()
        loop._make_self_pipe()
        passed_s = loop.time() - self._released_s
        # An equal shift keeps the order of the heap.
        for timer in loop._scheduled:
            timer._when += passed_s
        callbacks = list(loop._ready)
        loop._ready.clear()
        # After the callbacks that the server adds until its loop runs.
        loop.call_later(0, loop._ready.extend, callbacks)
        asyncio.set_event_loop(loop)
        return True


def _scheduled_call(handle: Any) -> functools.partial[Any]:
    """The call of a handle without its wrapper: tornado schedules its own method, whose argument is a partial."""
    if len(handle._args) == 1 and isinstance(handle._args[0], functools.partial):
        return handle._args[0]
    return functools.partial(handle._callback, *handle._args)
