"""Starts the supervisor: settings, sockets from systemd, one loop, signals.

    /usr/bin/python3 -m nbagent.supervisor

Signal handlers only queue. SIGHUP reads the settings and looks for images; SIGTERM leaves every
slot that is not half made as it is.
"""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import signal
import socket
import sys

from systemd import daemon

from nbagent.config import host_config
from nbagent.core import paths
from nbagent.core.errors import ConfigError
from nbagent.core.events import Event, emit
from nbagent.image.store import ImageStore
from nbagent.supervisor.agent import Agent
from nbagent.supervisor.calls import Calls
from nbagent.supervisor.network import Network
from nbagent.supervisor.records import Records
from nbagent.supervisor.server import ControlServer, serve_check
from nbagent.supervisor.zygotes import ForkLauncher, Zygotes
from nbagent.systemd.bus import Systemd


def main() -> int:
    """Runs until SIGTERM. Returns the exit status."""
    try:
        config = host_config.load()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    # Slots start with a clean mask whatever ours is.
    os.umask(0o022)
    asyncio.run(_run(config))
    return 0


async def _run(config: host_config.HostConfig) -> None:
    sockets = _activated()
    systemd = Systemd()
    records = Records(paths.SLOTS, grp.getgrnam("nbagent-router").gr_gid)
    zygotes = Zygotes(config, systemd)
    await zygotes.open()
    agent = Agent(
        config, systemd, ImageStore(paths.IMAGES), ForkLauncher(zygotes), zygotes, records, Network(config, systemd),
        paths.DRAIN,
    )
    zygotes.changed = agent.wake
    adopted = await agent.adopt()
    agent.refresh_images()
    calls = Calls(agent)
    tasks = [
        asyncio.ensure_future(agent.run()),
        asyncio.ensure_future(ControlServer(calls, sockets["control"], {0, _api_uid()}).serve()),
        asyncio.ensure_future(_watchdog()),
    ]
    if "check" in sockets:
        tasks.append(asyncio.ensure_future(serve_check(calls, sockets["check"])))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    loop.add_signal_handler(signal.SIGHUP, _reload, agent)
    daemon.notify("READY=1")
    emit(Event.AGENT_READY, label=agent.label, adopted=adopted, capacity=agent.host().capacity)
    stopped = asyncio.ensure_future(stop.wait())
    # A task that ends by itself is a bug: better a restart, which adopts every slot, than a limp.
    done, _ = await asyncio.wait({stopped, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    daemon.notify("STOPPING=1")
    await agent.stop()
    emit(Event.AGENT_STOPPING)
    for task in (*tasks, stopped):
        task.cancel()
    systemd.close()
    for task in done - {stopped}:
        task.result()


def _reload(agent: Agent) -> None:
    daemon.notify("RELOADING=1")
    try:
        agent.reload(host_config.load())
        emit(Event.CONFIG_RELOADED)
    except ConfigError as error:
        emit(Event.CONFIG_REFUSED, text=str(error))
        agent.refresh_images()
    daemon.notify("READY=1")


async def _watchdog() -> None:
    """Tells systemd that the loop turns, three times as often as it must."""
    interval_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 / 3
    while True:
        daemon.notify("WATCHDOG=1")
        await asyncio.sleep(interval_s or 3600)


def _activated() -> dict[str, socket.socket]:
    """The sockets systemd holds for this service, by their FileDescriptorName=."""
    named = daemon.listen_fds_with_names()
    found = {name: socket.socket(fileno=fd) for fd, name in named.items()}
    if "control" not in found:
        raise SystemExit("no socket named control: start nbagent.socket, or run by nbagent.service")
    return found


def _api_uid() -> int:
    return pwd.getpwnam("nbagent").pw_uid


if __name__ == "__main__":
    sys.exit(main())
