"""`python3 -m nbagent.api`: what nbagent-api.service runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nbagent.api import access
from nbagent.config import host_config
from nbagent.core import paths
from nbagent.core.errors import ConfigError
from nbagent.wire import control

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

_ADDRESS = "127.0.0.1:9000"
# units/nbagent-landing.socket.
_LANDING = paths.LANDING_SOCKET


def claim_deadline_s(settings: host_config.HostConfig) -> float:
    """How long the API waits for the supervisor's answer to a claim: longer than the claim waits."""
    return settings.pool.claim_timeout + settings.claims.timeout + 5


def main(argv: list[str] | None = None) -> None:
    """Serves until told to stop. Ends with EX_CONFIG when the configuration is refused."""
    parser = argparse.ArgumentParser(prog="nbagent-api", description="nbagent's control API")
    parser.add_argument("--config", type=Path, default=host_config.DEFAULT_PATH)
    parser.add_argument("--control", type=Path, default=control.SOCKET_PATH, help="the supervisor's socket")
    parser.add_argument("--token", type=Path, default=access.TOKEN_PATH, help="the file with the token")
    parser.add_argument("--landing", type=Path, default=_LANDING, help="the socket of the landing page, from systemd")
    parser.add_argument("--landing-token", type=Path, default=access.LANDING_TOKEN_PATH, help="its token")
    parser.add_argument("--bind", help="where to listen without socket activation")
    parser.add_argument("--check", action="store_true", help="only read the configuration")
    arguments = parser.parse_args(argv)
    try:
        host_config.load(arguments.config)
        if not arguments.check:
            _serve(arguments)
    except ConfigError as error:
        sys.stderr.write(f"nbagent-api: {error}\n")
        sys.exit(error.exit_status)


def _serve(arguments: argparse.Namespace) -> None:
    # Only now: a refused configuration is told in a tenth of the time.
    from nbagent.api import app
    from nbagent.api.backend import HostBackend
    from nbagent.landing.app import create_app as create_landing
    from nbagent.web import gunicorn_app
    from nbagent.web.tokens import TokenFile

    def shape(settings: host_config.HostConfig) -> gunicorn_app.Shape:
        return gunicorn_app.Shape(settings.api.workers, settings.api.threads, claim_deadline_s(settings) + 5)

    def make_app(settings: host_config.HostConfig) -> WSGIApplication:
        client = control.ControlClient(arguments.control, claim_deadline_s(settings))
        probe = control.ControlClient(arguments.control, app.PROBE_TIMEOUT_S)
        token = TokenFile(arguments.landing_token)
        landing = create_landing(settings.landing, HostBackend(settings, client, probe), token.matches)
        api = app.create_app(settings, client, arguments.token)
        return gunicorn_app.by_listener(api, {str(arguments.landing): landing})

    gunicorn_app.configure_logging()
    address = arguments.bind or _ADDRESS
    gunicorn_app.GunicornApp("nbagent-api", lambda: host_config.load(arguments.config), shape, make_app, address).run()


if __name__ == "__main__":
    main()
