# SPDX-License-Identifier: BSD-3-Clause
"""The supervisor's program: configuration, sockets from systemd, one event loop, signals.

    /usr/bin/python3 -m nbagent.supervisor

SIGHUP reloads the configuration and the list of images. SIGTERM ends the supervisor; warm and claimed slots go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pwd
import signal
import socket
import sys
from collections.abc import Mapping
from typing import Any

from systemd import daemon

from nbagent.config import host_config
from nbagent.config.host_config import CurrentConfig
from nbagent.core import logs, paths
from nbagent.core.errors import ConfigError
from nbagent.core.events import Event, emit
from nbagent.image.store import ImageStore
from nbagent.supervisor import fd_store, system_files
from nbagent.supervisor.composition import Supervisor, Surroundings, compose
from nbagent.supervisor.fork_launcher import ForkLauncher
from nbagent.supervisor.network import Network
from nbagent.supervisor.records import Records
from nbagent.supervisor.server import ControlServer, serve_check
from nbagent.supervisor.systemd import Systemd
from nbagent.supervisor.zygotes import Zygotes
from nbagent.systemd.watchdog import Watchdog

_LOG = logging.getLogger(__name__)


def main() -> int:
    """Runs until SIGTERM. Returns the exit status."""
    logs.configure()
    try:
        config = host_config.load()
    except ConfigError as error:
        _LOG.error("%s", error)
        return error.exit_status
    asyncio.run(_run(config))
    return 0


def end_without_memory(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Logs an unexpected error. After a MemoryError it ends the process, because the error may have interrupted any
    task between two of its steps, and the next supervisor adopts all that is complete and removes the rest.
    """
    loop.default_exception_handler(context)
    if isinstance(context.get("exception"), MemoryError):
        os._exit(1)


async def _run(config: host_config.HostConfig) -> None:
    asyncio.get_running_loop().set_exception_handler(end_without_memory)
    system_files.make(paths.SYSTEM_FILES)
    named = daemon.listen_fds_with_names()
    with contextlib.closing(Systemd()) as systemd:
        await _serve(config, _activated(named), named, systemd)


async def _serve(
    config: host_config.HostConfig, sockets: dict[str, socket.socket], named: Mapping[int, str], systemd: Systemd
) -> None:
    records = Records(paths.SLOTS)
    current, changed = CurrentConfig(config), asyncio.Event()
    zygotes = Zygotes(current, systemd, changed.set)
    await zygotes.open(fd_store.kept(named), fd_store.begun(named))
    supervisor = compose(Surroundings(
        current, systemd, ImageStore(paths.IMAGES), ForkLauncher(zygotes), zygotes, records,
        Network(current, systemd), paths.DRAIN, changed,
    ))
    agent, calls = supervisor.agent, supervisor.calls
    adopted = await supervisor.adoption.run()
    supervisor.images.refresh()
    servers = [asyncio.ensure_future(ControlServer(calls, sockets["control"], {0, _api_uid()}).serve())]
    if "check" in sockets:
        servers.append(asyncio.ensure_future(serve_check(calls, sockets["check"])))
    clock = supervisor.sessions.follow_clock(lambda: [live.slot for live in supervisor.slots.values()])
    guards = (supervisor.memory_guard.run(), supervisor.processor_guard.run())
    loops = (agent.run(), supervisor.health.run(), supervisor.resources.run(), *guards, clock, Watchdog().run())
    tasks = [*map(asyncio.ensure_future, loops), *servers]
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    loop.add_signal_handler(signal.SIGHUP, _reload, supervisor)
    daemon.notify("READY=1")
    emit(Event.AGENT_READY, label=config.label, adopted=adopted, capacity=supervisor.load.host().capacity)
    stopped = asyncio.ensure_future(stop.wait())
    # A task ends by itself only because of a bug. The service then ends, because systemd starts it again and every slot
    # is adopted.
    done, _ = await asyncio.wait({stopped, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    daemon.notify("STOPPING=1")
    # First, so that from now on requests wait in the backlog of systemd's socket for the next supervisor.
    for server in servers:
        server.cancel()
    await asyncio.gather(*servers, return_exceptions=True)
    # At a shutdown the units service, which systemd stops too, still responds until this process has ended.
    if await systemd.is_stopping():
        supervisor.sessions.host_stops(live.slot for live in supervisor.slots.values())
    await agent.stop()
    emit(Event.AGENT_STOPPING)
    for task in (*tasks, stopped):
        task.cancel()
    for task in done - {stopped}:
        task.result()


def _reload(supervisor: Supervisor) -> None:
    daemon.notify("RELOADING=1")
    try:
        supervisor.agent.reload(host_config.load())
        emit(Event.CONFIG_RELOADED)
    except ConfigError as error:
        emit(Event.CONFIG_REFUSED, text=str(error))
        supervisor.images.refresh()
    finally:
        # Also after an unexpected error, because systemd would take the service for one that reloads, without end.
        daemon.notify("READY=1")


def _activated(named: Mapping[int, str]) -> dict[str, socket.socket]:
    """The listening sockets of systemd, by FileDescriptorName=."""
    found = {name: socket.socket(fileno=fd) for fd, name in named.items() if name in ("control", "check")}
    if "control" not in found:
        raise SystemExit("no socket named control: start nbagent.socket, or run by nbagent.service")
    return found


def _api_uid() -> int:
    return pwd.getpwnam("nbagent").pw_uid


if __name__ == "__main__":
    sys.exit(main())
