"""`nbagent gateway`: the landing page of a fleet, on the machine that it runs on."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nbagent.core.errors import NbagentError

if TYPE_CHECKING:
    from nbagent.gateway.membership import Fleet

SETTINGS_PATH = Path("/etc/nbagent/gateway.toml")
RELOAD_TIMEOUT_S = 10.0
UNITS = ("nbagent-gateway.service", "nbagent-gateway-status.service")

_FILE = click.option("--config", "file", type=click.Path(path_type=Path), default=SETTINGS_PATH, show_default=True,
                     help="The configuration; beside it gateway.d.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class NotReloaded(NbagentError):
    """systemd did not reload the gateway."""

    code = "not-reloaded"
    title = "The gateway was not reloaded"


@click.group()
def gateway() -> None:
    """Set up and change the landing page of a fleet: HAProxy, and the hosts behind it."""


@gateway.command()
@_FILE
def render(file: Path) -> None:
    """Print the HAProxy configuration that the settings make."""
    from nbagent.gateway import haproxy, settings

    click.echo(haproxy.render(settings.load(file)), nl=False)


@gateway.command()
@_FILE
def check(file: Path) -> None:
    """Say whether the settings are right, and HAProxy takes what they make."""
    from nbagent.gateway import apply, settings

    found = settings.load(file)
    said = apply.try_out(found)
    if said:
        click.echo(said, err=True)
    hosts = f"hosts by {found.fleet.srv}" if found.fleet.srv else f"{len(found.hosts)} hosts"
    read = ", ".join(map(str, settings.settings_files(file)))
    click.echo(f"OK, {hosts}, read from {read}" if read else f"OK, {hosts}, no file: every setting has its default")


@gateway.command()
@_FILE
def apply(file: Path) -> None:
    """Put the settings into force, and close no connection by it."""
    from nbagent.gateway import apply, settings

    apply.try_out(settings.load(file))
    before = _worker()
    done = subprocess.run(["systemctl", "reload-or-restart", *UNITS], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotReloaded(done.stderr.strip())
    # systemd has told HAProxy's master, which says nothing; a new worker is what shows that it was done.
    deadline_s = time.monotonic() + RELOAD_TIMEOUT_S
    while _worker() in (None, before):
        if time.monotonic() > deadline_s:
            raise NotReloaded("HAProxy stays with what it had; journalctl -u nbagent-gateway says why")
        time.sleep(0.05)
    click.echo("applied")


@gateway.command()
@_FILE
def write(file: Path) -> None:
    """Write what HAProxy reads below /run; nbagent-gateway.service does, when it starts and reloads."""
    from nbagent.gateway import apply, settings

    click.echo(apply.write(settings.load(file)))


@gateway.command()
@_FILE
@_JSON
def hosts(file: Path, as_json: bool) -> None:
    """Show the hosts, and how they do."""
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
@click.option("--port", type=int, default=8000, show_default=True, help="The port of its router.")
@click.option("--check-port", type=int, default=9001, show_default=True, help="The port that tells its capacity.")
@click.option("--weight", type=int, default=100, show_default=True, help="Its size beside the others', 1 to 256.")
@_FILE
def add_host(file: Path, label: str, address: str, port: int, check_port: int, weight: int) -> None:
    """Add the host LABEL at the IP address ADDRESS, at once and for good."""
    from nbagent.gateway import settings

    given = {"address": address, "port": port, "check_port": check_port, "weight": weight}
    host = settings.parse({"hosts": {label: given}}).hosts[label]
    click.echo(_fleet(file).add(label, host))


@gateway.command("drain-host")
@click.argument("label")
@click.option("--off", is_flag=True, help="Ask it for slots again.")
@_FILE
def drain_host(file: Path, label: str, off: bool) -> None:
    """Ask the host LABEL for no more slots; its users stay."""
    click.echo(_fleet(file).drain(label, not off))


@gateway.command("remove-host")
@click.argument("label")
@click.option("--force", is_flag=True, help="Also when slots run on it; who uses one is cut off.")
@_FILE
def remove_host(file: Path, label: str, force: bool) -> None:
    """Take the drained host LABEL out of the fleet."""
    click.echo(_fleet(file).remove(label, force))


def _worker() -> str | None:
    """The HAProxy process at work, None when there is none."""
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
