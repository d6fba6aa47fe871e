# SPDX-License-Identifier: BSD-3-Clause
"""The port of HAProxy's agent-check, which strangers may reach."""

import asyncio
import contextlib
import select
import socket
from types import SimpleNamespace

from nbagent.supervisor.server import serve_check

CALLS = SimpleNamespace(draining=False, free_percent=lambda: 70)
COUNT = 50


async def test_other_tasks_run_between_the_connections_of_a_flood():
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=COUNT))
        clients = [stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(COUNT)]
        serving = asyncio.ensure_future(serve_check(CALLS, listener))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(select.select(clients, [], [], 0)[0]) <= 2
        while len(select.select(clients, [], [], 0)[0]) < COUNT:
            await asyncio.sleep(0.01)
        assert {client.recv(100) for client in clients} == {b"ready 70%\n"}
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
