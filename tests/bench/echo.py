#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""A stand-in for a host whose slots have websockets that echo each message. Serves /healthz too.

    tests/bench/echo.py ADDRESS
"""

from __future__ import annotations

import asyncio
import sys

import agents
from aiohttp import web


async def healthz(_: web.Request) -> web.Response:
    return web.json_response("ok")


async def channels(request: web.Request) -> web.WebSocketResponse:
    """A websocket as a kernel's: open until the client closes it."""
    socket = web.WebSocketResponse(compress=False)
    await socket.prepare(request)
    async for message in socket:
        await socket.send_str(message.data)
    return socket


async def serve(address: str) -> None:
    """Serves until killed. Prints a line on standard output when it listens."""
    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/user/{slot}/channels", channels)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, address, agents.ROUTER_PORT, backlog=4096).start()
    print("listening", flush=True)
    await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
