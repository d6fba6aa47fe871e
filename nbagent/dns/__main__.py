# SPDX-License-Identifier: BSD-3-Clause
"""`python3 -m nbagent.dns`: nbagent-dns-update.service; with --gateway, nbagent-gateway-dns.service."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import click

from nbagent.config import host_config
from nbagent.core import logs
from nbagent.core.errors import ConfigError
from nbagent.core.events import emit
from nbagent.dns import require_library

_LOG = logging.getLogger(__name__)


@click.command()
@click.option("--config", type=click.Path(readable=False, path_type=Path), help="The configuration file.")
@click.option("--gateway", is_flag=True, help="Remove the records of dead hosts, on a gateway.")
@click.pass_context
def main(context: click.Context, config: Path | None, gateway: bool) -> None:
    """Keep the records of this host in the DNS until SIGTERM.

    The exit status is EX_CONFIG if the configuration is refused.
    """
    logs.configure()
    try:
        require_library()
        _run_gateway(config) if gateway else _run_host(config)
    except ConfigError as error:
        _LOG.error("nbagent.dns: %s", error)
        context.exit(error.exit_status)


def _run_host(config: Path | None) -> None:
    from systemd import daemon

    from nbagent.dns import key, publisher

    settings = host_config.load(config or host_config.DEFAULT_PATH)
    publisher.place_of(settings)  # first, because a host without dns.server needs no key
    registry = publisher.Registry(settings, key.read(), publisher.MACHINE_ID.read_text())
    loop = publisher.Publisher(registry, publisher.agent_state, emit)
    ended = _ended()
    is_final = _sent(signal.SIGUSR1)
    daemon.notify("READY=1")
    shown = ""
    while not ended.wait(publisher.POLL_S):
        loop.step(time.monotonic())
        if loop.status != shown:
            shown = loop.status
            daemon.notify(f"STATUS={shown}")
    loop.stop(is_final.is_set(), time.monotonic())


def _run_gateway(config: Path | None) -> None:
    from systemd import daemon

    from nbagent.dns import key, removal
    from nbagent.gateway import haproxy, settings
    from nbagent.gateway.runtime import Runtime

    found = settings.load(config or settings.DEFAULT_PATH)
    removal.require_settings(found)
    runtime, backend = Runtime(haproxy.STATS_SOCKET), haproxy.all_hosts(found)
    loop = removal.Removal(found, key.read(), lambda: runtime.servers(backend), emit)
    ended = _ended()
    daemon.notify("READY=1")
    while not ended.wait(removal.POLL_S):
        loop.step(time.monotonic())


def _ended() -> threading.Event:
    """An event that SIGTERM sets."""
    return _sent(signal.SIGTERM)


def _sent(number: signal.Signals) -> threading.Event:
    """An event that a signal sets."""
    sent = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        sent.set()

    signal.signal(number, note)
    return sent


if __name__ == "__main__":
    sys.exit(main())
