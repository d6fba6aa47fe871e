# SPDX-License-Identifier: BSD-3-Clause
"""Channels in an event loop. Standard library only; Python 3.9 and up."""

from __future__ import annotations

import asyncio
import socket
from typing import Optional

from nbagent.wire.accepting import ACCEPT_PAUSE_S, EXHAUSTED
from nbagent.wire.channel import Channel, Message


async def readable(fd: int) -> None:
    """Returns when `fd` can be read or is at its end; for a pidfd, when its process has ended."""
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


async def receive(channel: Channel) -> Optional[Message]:
    """As Channel.receive; other tasks run while it waits. A cancelled call has received nothing."""
    while True:
        try:
            return channel.receive(wait=False)
        except BlockingIOError:
            await readable(channel.fileno())


async def accept(listener: socket.socket) -> socket.socket:
    """The next connection, which does not block. Waits while no descriptor or memory is left. Raises OSError."""
    while True:
        try:
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            return connection
        except OSError as error:
            if error.errno not in EXHAUSTED:
                raise
            await asyncio.sleep(ACCEPT_PAUSE_S)
