"""Waiting for a descriptor in the event loop."""

from __future__ import annotations

import asyncio


async def readable(fd: int) -> None:
    """Returns when `fd` is readable or its peer has closed it; a pidfd is readable when its process has ended."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, wake)
    try:
        await ready
    finally:
        loop.remove_reader(fd)
