# SPDX-License-Identifier: BSD-3-Clause
"""`nbagent dns`: the records of this host, or of hosts behind this gateway, in the DNS."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nbagent.config import host_config
from nbagent.core import paths
from nbagent.core.errors import NbagentError

if TYPE_CHECKING:
    from nbagent.dns.records import Place
    from nbagent.dns.server import Server

_GATEWAY = click.option("--gateway", is_flag=True, help="Use the settings of the gateway on this machine.")
_FILE = click.option("--config", "file", type=click.Path(readable=False, path_type=Path),
                     help="The configuration file.  [default: nbagent.toml, or gateway.toml, in /etc/nbagent]")
_KEY = click.option("--key", "key_file", type=click.Path(readable=False, path_type=Path), default=paths.DNS_KEY,
                    show_default=True, help="The file with the TSIG key.")


class NothingWithdrawn(NbagentError):
    """A host has no records."""

    code = "no-records"
    title = "No records"
    exit_status = 3


@click.group()
def dns() -> None:
    """Check and withdraw the DNS records of hosts. nbagent-dns-update.service publishes them."""
    from nbagent.dns import require_library

    require_library()


@dns.command()
@_GATEWAY
@_FILE
@_KEY
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(gateway: bool, file: Path | None, key_file: Path, as_json: bool) -> None:
    """Check settings, key, server, permissions and records. The exit status is 1 if a check fails.

    Sends an update that deletes records that do not exist, because that needs the same permissions as publishing.
    """
    from nbagent.cli import tables
    from nbagent.dns import check as checks
    from nbagent.dns.publisher import agent_state
    from nbagent.gateway import settings

    if gateway:
        results = list(checks.check_gateway(settings.load(file or settings.DEFAULT_PATH), key_file))
    else:
        results = list(checks.check_host(host_config.load(file or host_config.DEFAULT_PATH), agent_state, key_file))
    if as_json:
        click.echo(json.dumps([result._asdict() for result in results], indent=2 if os.isatty(1) else None))
    else:
        tables.show(checks.COLUMNS, results)
    if any(result.status == checks.FAIL for result in results):
        sys.exit(1)


@dns.command()
@_GATEWAY
@_FILE
@_KEY
@click.option("--label", help="Label of a host that is gone.  [default: this host]")
def withdraw(gateway: bool, file: Path | None, key_file: Path, label: str | None) -> None:
    """Remove all records of this host, or of one that is gone.

    Stop nbagent-dns-update.service of the host before, because it would publish them again.
    """
    from nbagent.dns.removal import remove_host

    if gateway and label is None:
        raise click.UsageError("--gateway needs --label, because a gateway has no records of its own")
    if label is not None and not re.fullmatch(r"[a-z0-9]{1,16}", label):
        raise click.UsageError(f"--label {label}: expected 1 to 16 characters of a-z and 0-9")
    server, place = _place(gateway, file, key_file, label)
    if not remove_host(server, place):
        raise NothingWithdrawn(f"{place.host} has no records")
    click.echo(f"records of {place.host} removed")


def _place(gateway: bool, file: Path | None, key_file: Path, label: str | None) -> tuple[Server, Place]:
    from nbagent.dns import key, publisher, removal
    from nbagent.dns.records import Place
    from nbagent.dns.server import Server
    from nbagent.gateway import settings

    if gateway:
        found = settings.load(file or settings.DEFAULT_PATH)
        removal.require_settings(found)
        server, domain = removal.server_of(found, key.read(key_file))
        return server, Place(server.zone, domain, label or "")
    config = host_config.load(file or host_config.DEFAULT_PATH)
    own = publisher.place_of(config)
    assert config.dns.server is not None
    return Server(config.dns.server, own.zone, key.read(key_file)), Place(own.zone, own.domain, label or own.label)
