# SPDX-License-Identifier: BSD-3-Clause
"""`nbagent gateway`: the gateway of a fleet, on the machine that runs it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nbagent.core import paths
from nbagent.core.errors import NbagentError

if TYPE_CHECKING:
    from nbagent.gateway.membership import Fleet

RELOAD_TIMEOUT_S = 10.0
UNITS = ("nbagent-gateway.service", "nbagent-gateway-status.service")

_FILE = click.option("--config", "file", type=click.Path(readable=False, path_type=Path),
                     default=paths.GATEWAY_SETTINGS, show_default=True,
                     help="The configuration file; gateway.d is beside it.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class NotReloaded(NbagentError):
    """systemd or HAProxy did not reload the gateway."""

    code = "not-reloaded"
    title = "The gateway was not reloaded"


@click.group()
def gateway() -> None:
    """Configure the gateway of a fleet and the hosts behind it."""


@gateway.command()
@_FILE
def render(file: Path) -> None:
    """Print HAProxy's configuration, generated from the settings."""
    from nbagent.gateway import haproxy, settings

    click.echo(haproxy.render(settings.load(file)), nl=False)


@gateway.command()
@_FILE
def check(file: Path) -> None:
    """Check the settings and HAProxy's configuration made of them."""
    from nbagent.gateway import apply, settings

    found = settings.load(file)
    warnings = apply.try_out(found)
    if warnings:
        click.echo(warnings, err=True)
    hosts = f"hosts from {found.fleet.srv}" if found.fleet.srv else f"{len(found.hosts)} hosts"
    files = ", ".join(map(str, settings.settings_files(file)))
    source = f"read from {files}" if files else "no file found: every setting has its default"
    click.echo(f"OK, {hosts}, {source}")


@gateway.command()
@_FILE
def apply(file: Path) -> None:
    """Apply the settings without closing a connection."""
    from nbagent.gateway import apply, settings

    apply.try_out(settings.load(file))
    before = _worker()
    done = subprocess.run(["systemctl", "reload-or-restart", *UNITS], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotReloaded(done.stderr.strip())
    # HAProxy's master does not report the result of a reload to systemd, but a successful one starts a new worker.
    deadline_s = time.monotonic() + RELOAD_TIMEOUT_S
    while _worker() in (None, before):
        if time.monotonic() > deadline_s:
            raise NotReloaded("HAProxy keeps its previous configuration; see journalctl -u nbagent-gateway")
        time.sleep(0.05)
    click.echo("applied")


@gateway.command()
@_FILE
def write(file: Path) -> None:
    """Write HAProxy's files to /run. nbagent-gateway.service does this at a start and a reload."""
    from nbagent.gateway import apply, settings

    click.echo(apply.write(settings.load(file)))


@gateway.command()
@_FILE
@_JSON
def hosts(file: Path, as_json: bool) -> None:
    """Show the hosts and their state."""
    from nbagent.cli import tables
    from nbagent.gateway import fleet

    changing = _fleet(file)
    backend = fleet.FleetBackend(lambda: changing.runtime.servers(changing.backend))
    figures = backend.stats()
    if as_json:
        click.echo(json.dumps(figures, indent=2 if os.isatty(1) else None))
        return
    rows = []
    for url, host in sorted(figures["hosts"].items()):
        state = "down" if host.get("down") else "draining" if host.get("draining") else "up"
        cells = (str(host.get(name, "-")) for name in ("available", "in_use", "warm", "starting"))
        rows.append((url.removeprefix("http://"), state, *cells))
    tables.show(("HOST", "STATE", "FREE", "IN USE", "WARM", "STARTING"), rows)


@gateway.command("add-host")
@click.argument("label")
@click.argument("address")
@click.option("--port", type=int, default=8000, show_default=True, help="The port of the host's router.")
@click.option("--check-port", type=int, default=9001, show_default=True, help="The port of the host's agent check.")
@click.option("--weight", type=int, default=100, show_default=True, help="Size relative to other hosts, 1 to 256.")
@_FILE
def add_host(file: Path, label: str, address: str, port: int, check_port: int, weight: int) -> None:
    """Add the host LABEL at the IP address ADDRESS to the fleet. Claims reach it at once."""
    from nbagent.gateway import settings

    given = {"address": address, "port": port, "check_port": check_port, "weight": weight}
    host = settings.parse({"hosts": {label: given}}).hosts[label]
    click.echo(_fleet(file).add(label, host))


@gateway.command("drain-host")
@click.argument("label")
@click.option("--off", is_flag=True, help="Send claims to the host again.")
@_FILE
def drain_host(file: Path, label: str, off: bool) -> None:
    """Send no more claims to the host LABEL; its users stay."""
    click.echo(_fleet(file).drain(label, not off))


@gateway.command("remove-host")
@click.argument("label")
@click.option("--force", is_flag=True, help="Remove it even if slots run on it, and close their connections.")
@_FILE
def remove_host(file: Path, label: str, force: bool) -> None:
    """Remove the drained host LABEL from the fleet."""
    click.echo(_fleet(file).remove(label, force))


def _worker() -> str | None:
    """The pid of HAProxy's worker process, or None if HAProxy is not running."""
    from nbagent.gateway import haproxy
    from nbagent.gateway.runtime import GatewayDown, Runtime

    try:
        return Runtime(haproxy.ADMIN_SOCKET).worker()
    except GatewayDown:
        return None


def _fleet(file: Path) -> Fleet:
    from nbagent.gateway import haproxy
    from nbagent.gateway.membership import Fleet
    from nbagent.gateway.runtime import Runtime

    return Fleet(file, Runtime(haproxy.ADMIN_SOCKET))
