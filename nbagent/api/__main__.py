# SPDX-License-Identifier: BSD-3-Clause
"""`python3 -m nbagent.api`: the program of nbagent-api.service."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nbagent.api import access
from nbagent.config import host_config
from nbagent.core import logs, paths
from nbagent.core.errors import ConfigError
from nbagent.wire import control

if TYPE_CHECKING:
    from nbagent.web.server import Service
    from nbagent.web.tokens import TokenFile

_LOG = logging.getLogger(__name__)
_ADDRESS = "127.0.0.1:9000"
# The path of units/nbagent-landing.socket.
_LANDING = paths.LANDING_SOCKET
# Without the check for readability, because the service may connect to its sockets, but not read them.
_PATH = click.Path(readable=False, path_type=Path)


@dataclass(frozen=True)
class Arguments:
    """The paths and the address of the command line."""

    config: Path
    control_socket: Path
    token: Path
    landing_socket: Path
    landing_token: Path
    bind: str


@click.command("nbagent-api")
@click.option("--config", type=_PATH, default=host_config.DEFAULT_PATH, help="The settings file.")
@click.option("--control", "control_socket", type=_PATH, default=control.SOCKET_PATH,
              help="The control socket of the supervisor.")
@click.option("--token", type=_PATH, default=access.TOKEN_PATH, help="The file with the token.")
@click.option("--landing", "landing_socket", type=_PATH, default=_LANDING,
              help="The socket of the landing page, held by systemd.")
@click.option("--landing-token", type=_PATH, default=access.LANDING_TOKEN_PATH,
              help="The file with the landing page's token.")
@click.option("--bind", default=_ADDRESS, help="The address to listen on without socket activation.")
@click.option("--check", is_flag=True, help="Only read the settings.")
def main(
    config: Path, control_socket: Path, token: Path, landing_socket: Path, landing_token: Path, bind: str, check: bool
) -> None:
    """The control API of nbagent. Exits with EX_CONFIG when the settings are invalid."""
    logs.configure()
    try:
        host_config.load(config)
        if not check:
            _serve(Arguments(config, control_socket, token, landing_socket, landing_token, bind))
    except ConfigError as error:
        _LOG.error("nbagent-api: %s", error)
        sys.exit(error.exit_status)


def claim_deadline_s(settings: host_config.HostConfig) -> float:
    """How long the API waits for the supervisor's response to a claim: longer than the claim itself may wait."""
    return settings.pool.claim_timeout + settings.claims.timeout + 5


def _serve(arguments: Arguments) -> None:
    # Imported here, so that invalid settings are reported without loading Flask and gunicorn.
    from nbagent.api import app, lanes
    from nbagent.api.backend import HostBackend
    from nbagent.landing.app import create_app as create_landing
    from nbagent.web import gunicorn_app, tokens

    def make_service(settings: host_config.HostConfig) -> Service:
        client = control.ControlClient(arguments.control_socket, claim_deadline_s(settings))
        probe = control.ControlClient(arguments.control_socket, app.PROBE_TIMEOUT_S)
        token, landing_token = tokens.passed(arguments.token), tokens.passed(arguments.landing_token)
        _warn_of_absent(settings, token, landing_token)
        api = app.create_app(settings, client, arguments.token)
        return lanes.make_service(
            settings.api, api, token, str(arguments.landing_socket),
            create_landing(settings.landing, HostBackend(settings, client, probe), landing_token.matches),
        )

    gunicorn_app.GunicornApp(
        "nbagent-api", lambda: host_config.load(arguments.config),
        lambda settings: gunicorn_app.Shape(settings.api.workers, claim_deadline_s(settings) + 5),
        make_service, arguments.bind,
    ).run()


def _warn_of_absent(settings: host_config.HostConfig, token: TokenFile, landing_token: TokenFile) -> None:
    """Logs each token that is missing or empty, if the settings need it."""
    needed = [(token, "only networks in api.trusted_networks may call the API")]
    if settings.landing.access == "token":
        needed.append((landing_token, 'no client may start a slot, because landing.access is "token"'))
    for file, effect in needed:
        if not file.read():
            remedy = f"write a token with: openssl rand -hex 32 > {file.path}"
            _LOG.warning("%s is missing or empty: %s; %s", file.path, effect, remedy)


if __name__ == "__main__":
    main()
