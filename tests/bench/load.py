# SPDX-License-Identifier: BSD-3-Clause
"""Claims by tmpnb's API, at a rate or with a fixed number of clients. By asyncio, in the calling thread."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from claimed import Claimed, slot_of

# Longer than all of HAProxy's deadlines for a claim.
_TIMEOUT_S = 120


Then = Callable[[aiohttp.ClientSession, Claimed], Awaitable[None]]


def session() -> aiohttp.ClientSession:
    """A session without a bound on connections, because a burst opens all at once."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S))


async def claim(http: aiohttp.ClientSession, url: str) -> Claimed:
    """POST /api/spawn."""
    began_s, status, slot = time.perf_counter(), 0, ""
    try:
        async with http.post(f"{url}/api/spawn") as answer:
            text = await answer.text()
            status = answer.status
        if status == 200:
            slot = slot_of(json.loads(text)["url"])
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError):
        status = 0
    return Claimed(status, slot, began_s, 1000 * (time.perf_counter() - began_s))


async def at_rate(url: str, count: int, a_second: float) -> list[Claimed]:
    """`claims` claims, begun at a constant rate, independent of their duration."""
    async with session() as http:
        began_s, tasks = time.perf_counter(), []
        for number in range(count):
            await asyncio.sleep(max(0.0, began_s + number / a_second - time.perf_counter()))
            tasks.append(asyncio.create_task(claim(http, url)))
        return list(await asyncio.gather(*tasks))


async def at_a_time(
    url: str, count: int, many: int, then: Then | None = None, halfway: Callable[[], Any] | None = None,
    seconds: float | None = None,
) -> list[Claimed]:
    """`many` clients that claim one after another, `count` in all, or until `seconds` are over.

    `then` is done with each slot before its client claims the next; `halfway` is called, in a
    thread, when a third is claimed.
    """
    made: list[Claimed] = []
    left, begun = iter(range(count)), time.perf_counter()

    async def client(http: aiohttp.ClientSession) -> None:
        for number in left:
            if seconds is not None and time.perf_counter() > begun + seconds:
                return
            if halfway and number == count // 3:
                deeds.append(asyncio.create_task(asyncio.to_thread(halfway)))
            made.append(await claim(http, url))
            if then and made[-1].slot:
                await then(http, made[-1])

    deeds: list[asyncio.Task[Any]] = []
    async with session() as http:
        await asyncio.gather(*(client(http) for _ in range(many)))
    await asyncio.gather(*deeds)
    return made
