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

from nbagent.core import logs
from nbagent.linux.cgroup import MigrationPrimer
from nbagent.systemd.bus import Systemd
from nbagent.systemd.watchdog import Watchdog
from nbagent.units import requests
from nbagent.wire import multiplex
from nbagent.wire.aio import accept
from nbagent.wire.channel import Channel
from nbagent.wire.failure import Failure

# How much longer than TimeoutStopSec= the stop may take, and how often systemd gets to know it.
STOP_EXTENDED_S, STOP_NOTIFIED_S = 5, 1.0


async def serve(
    manager: requests.Manager,
    listener: socket.socket,
    stop: asyncio.Event,
    prime: Callable[[], None] = lambda: None,
    notify: Callable[[str], object] = lambda text: None,
) -> None:
    """Serves each connection in a task until `stop` is set, and at a shutdown of the host until the last one ends.

    At a shutdown systemd stops this service, the supervisor and slots at the same time. The supervisor has requests
    until it has ended, first of all whether the reason for the end of a slot is a shutdown. `notify` is sd_notify(3).
    """
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    listener.setblocking(False)

    async def accept_all() -> None:
        while True:
            connection = await accept(listener)
            connection.setblocking(False)
            task = loop.create_task(_serve_one(manager, Channel(connection, requests.REQUEST_MAX_BYTES), prime))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    accepting = loop.create_task(accept_all())
    stopped = loop.create_task(stop.wait())
    await asyncio.wait({accepting, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if stop.is_set() and _host_stops(manager):
        while tasks:
            notify(f"EXTEND_TIMEOUT_USEC={STOP_EXTENDED_S * 1_000_000}")
            await asyncio.wait(tasks, timeout=STOP_NOTIFIED_S)
    for task in (accepting, stopped):
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await accepting


def _host_stops(manager: requests.Manager) -> bool:
    try:
        return manager.is_stopping()
    except OSError:
        return False


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
    watchdog = Watchdog()
    # While PID 1 does not respond, each call blocks the loop, and several can follow each other in one turn of it.
    systemd = Systemd(watchdog.notify)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    daemon.notify("READY=1")
    notifying = asyncio.ensure_future(watchdog.run())
    await serve(systemd, listener, stop, _primer(), daemon.notify)
    notifying.cancel()
    systemd.close()


def main() -> None:
    """Serves until SIGTERM."""
    logs.configure()
    fds = daemon.listen_fds()
    if len(fds) != 1:
        raise SystemExit("no listening socket from systemd: start nbagent-units.socket")
    with socket.socket(fileno=int(fds[0])) as listener:
        asyncio.run(_run(listener))


if __name__ == "__main__":
    main()
