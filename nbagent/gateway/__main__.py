# SPDX-License-Identifier: BSD-3-Clause
"""`python3 -m nbagent.gateway`: nbagent-gateway-status.service, which serves requests from HAProxy only."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nbagent.core import logs, paths
from nbagent.core.errors import ConfigError
from nbagent.gateway import haproxy, settings
from nbagent.gateway.fleet import FleetBackend
from nbagent.gateway.runtime import Runtime
from nbagent.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from nbagent.web.server import Service

_LOG = logging.getLogger(__name__)
THREADS = 32
_SLOT = re.compile(rf"/user/({settings.LABEL})-[a-z0-9]+(?:/|$)")


@click.command()
@click.option("--config", type=click.Path(readable=False, path_type=Path), default=settings.DEFAULT_PATH,
              show_default=True, help="The configuration file.")
@click.option("--bind", default=f"unix:{paths.GATEWAY_STATUS_SOCKET}", show_default=True,
              help="The address to listen on if systemd passes no socket.")
@click.pass_context
def main(context: click.Context, config: Path, bind: str) -> None:
    """Serve the landing page and the figures of a fleet until SIGTERM.

    The exit status is EX_CONFIG if the configuration is refused.
    """
    logs.configure()
    try:
        _serve(config, bind)
    except ConfigError as error:
        _LOG.error("nbagent-gateway-status: %s", error)
        context.exit(error.exit_status)


def _serve(config: Path, bind: str) -> None:
    from nbagent.web import gunicorn_app

    # The longest request is one that fetches the figures of the hosts (fleet.DEADLINE_S).
    shape = gunicorn_app.Shape(workers=1, graceful_s=5)
    gunicorn_app.GunicornApp(
        "nbagent-gateway-status", lambda: settings.load(config), lambda _: shape, make_service, bind
    ).run()


def make_service(found: GatewaySettings) -> Service:
    """One lane, because HAProxy is the only peer."""
    from nbagent.web.server import Lane, Service

    lane = Lane(make_app(found), THREADS, address_connections=None)
    return Service(lambda listener, peer: lane, haproxy.CLAIM_MAX_BYTES)


def make_app(found: GatewaySettings) -> WSGIApplication:
    """The WSGI application: the landing page of the fleet, and error pages for hosts that do not respond."""
    from nbagent.landing.app import create_app

    backend = haproxy.all_hosts(found)
    runtime = Runtime(haproxy.STATS_SOCKET)
    fleet = FleetBackend(lambda: runtime.servers(backend))
    # The token is not checked, because a claim arrives here only after all hosts have refused it.
    landing = create_app(found.landing, fleet, lambda _: True)
    return silent_hosts(landing, fleet.knows, paths.GATEWAY_PAGES)


def silent_hosts(landing: WSGIApplication, knows: Callable[[str], bool], pages: Path) -> WSGIApplication:
    """`landing`, with 503 for slots of known hosts: HAProxy sends such a request here if it cannot reach the host."""

    def serve(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        match = _SLOT.match(environ.get("PATH_INFO", ""))
        if match is None or not knows(match[1]):
            return landing(environ, start_response)
        accept, below = environ.get("HTTP_ACCEPT", ""), environ["PATH_INFO"][match.end() :]
        name, kind = "lost.html", "text/html; charset=utf-8"
        if re.match(r"api(/|$)", below) or ("json" in accept and "text/html" not in accept):
            name, kind = "lost.json", "application/problem+json"
        body = (pages / name).read_bytes()
        start_response("503 Service Unavailable", [
            ("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store"),
            ("Retry-After", "5"), ("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'"),
        ])
        return [body]

    return serve


if __name__ == "__main__":
    main()
