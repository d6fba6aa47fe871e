# SPDX-License-Identifier: BSD-3-Clause
"""The units service's program: requests from a socket, and calls of systemd over D-Bus.

    python3 -I -m nbagent.units      as nbagent-units.service, with a listening socket from systemd

nbagent.units.requests describes the requests. The service keeps no state: after it was killed, the next request starts
it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Callable

from systemd import daemon

from nbagent.linux.cgroup import MigrationPrimer
from nbagent.systemd.bus import Systemd
from nbagent.systemd.watchdog import Watchdog
from nbagent.units import requests
from nbagent.wire import multiplex
from nbagent.wire.aio import accept
from nbagent.wire.channel import Channel
from nbagent.wire.failure import Failure


async def serve(
    manager: requests.Manager, listener: socket.socket, prime: Callable[[], None] = lambda: None
) -> None:
    """Serves until cancelled, each connection in a task."""
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    listener.setblocking(False)
    while True:
        connection = await accept(listener)
        connection.setblocking(False)
        task = loop.create_task(_serve_one(manager, Channel(connection, requests.REQUEST_MAX_BYTES), prime))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _serve_one(manager: requests.Manager, channel: Channel, prime: Callable[[], None]) -> None:
    with channel:
        if (uid := channel.peer_uid()) != 0:
            error = PermissionError(errno.EPERM, f"user id {uid} may not use the units service")
            with contextlib.suppress(OSError):
                channel.send(Failure.of(error, "units").save())
            return
        await multiplex.serve(channel, "units", lambda body: requests.respond(manager, body, prime))


def _primer() -> Callable[[], None]:
    """MigrationPrimer.prime; where this service may not write to its cgroup, nothing, and moves are slower."""
    try:
        return MigrationPrimer().prime
    except OSError:
        return lambda: None


async def _run(listener: socket.socket) -> None:
    systemd = Systemd()
    serving = asyncio.ensure_future(serve(systemd, listener, _primer()))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    daemon.notify("READY=1")
    watchdog = asyncio.ensure_future(Watchdog().run())
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    watchdog.cancel()
    systemd.close()


def main() -> None:
    """Serves until SIGTERM."""
    fds = daemon.listen_fds()
    if len(fds) != 1:
        raise SystemExit("no listening socket from systemd: start nbagent-units.socket")
    with socket.socket(fileno=int(fds[0])) as listener:
        asyncio.run(_run(listener))


if __name__ == "__main__":
    main()
