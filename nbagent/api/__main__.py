"""`python3 -m nbagent.api`: what nbagent-api.service runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nbagent import config, control
from nbagent.api import access
from nbagent.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

_ADDRESS = "127.0.0.1:9000"
# units/nbagent-door.socket.
_DOOR = Path("/run/nbagent/door.sock")


def claim_deadline_s(settings: config.Config) -> float:
    """How long the API waits for the supervisor's answer to a claim: longer than the claim waits."""
    return settings.pool.claim_timeout + settings.claims.timeout + 5


def main(argv: list[str] | None = None) -> None:
    """Serves until told to stop. Ends with EX_CONFIG when the configuration is refused."""
    parser = argparse.ArgumentParser(prog="nbagent-api", description="nbagent's control API")
    parser.add_argument("--config", type=Path, default=config.DEFAULT_PATH)
    parser.add_argument("--control", type=Path, default=control.SOCKET_PATH, help="the supervisor's socket")
    parser.add_argument("--token", type=Path, default=access.TOKEN_PATH, help="the file with the token")
    parser.add_argument("--door", type=Path, default=_DOOR, help="the socket of the front door, from systemd")
    parser.add_argument("--door-token", type=Path, default=access.DOOR_TOKEN_PATH, help="its token")
    parser.add_argument("--bind", help="where to listen without socket activation")
    parser.add_argument("--check", action="store_true", help="only read the configuration")
    arguments = parser.parse_args(argv)
    try:
        config.load(arguments.config)
        if not arguments.check:
            _serve(arguments)
    except ConfigError as error:
        sys.stderr.write(f"nbagent-api: {error}\n")
        sys.exit(error.exit_status)


def _serve(arguments: argparse.Namespace) -> None:
    # Only now: a refused configuration is told in a tenth of the time.
    from nbagent import serving
    from nbagent.api import app
    from nbagent.api.house import HostHouse
    from nbagent.door.app import create_app as create_door
    from nbagent.tokens import TokenFile

    def shape(settings: config.Config) -> serving.Shape:
        return serving.Shape(settings.api.workers, settings.api.threads, claim_deadline_s(settings) + 5)

    def make_app(settings: config.Config) -> WSGIApplication:
        client = control.ControlClient(arguments.control, claim_deadline_s(settings))
        probe = control.ControlClient(arguments.control, app.PROBE_TIMEOUT_S)
        door = create_door(settings.door, HostHouse(settings, client, probe), TokenFile(arguments.door_token).matches)
        return serving.by_listener(app.create_app(settings, client, arguments.token), {str(arguments.door): door})

    serving.configure_logging()
    address = arguments.bind or _ADDRESS
    serving.Server("nbagent-api", lambda: config.load(arguments.config), shape, make_app, address).run()


if __name__ == "__main__":
    main()
