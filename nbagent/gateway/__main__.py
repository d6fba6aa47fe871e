"""`python3 -m nbagent.gateway`: what nbagent-gateway-status.service runs, behind HAProxy and for it alone."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from nbagent.core.errors import ConfigError
from nbagent.gateway import haproxy, settings
from nbagent.gateway.fleet import FleetBackend
from nbagent.gateway.runtime import Runtime
from nbagent.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_SLOT = re.compile(rf"/user/({settings.LABEL})-[a-z0-9]+(?:/|$)")


def main(argv: list[str] | None = None) -> None:
    """Serves until told to stop. Ends with EX_CONFIG when the configuration is refused."""
    parser = argparse.ArgumentParser(prog="nbagent-gateway-status", description="the pages and figures of a fleet")
    parser.add_argument("--config", type=Path, default=settings.DEFAULT_PATH)
    parser.add_argument("--bind", default=f"unix:{haproxy.STATUS_SOCKET}", help="where to listen without systemd")
    arguments = parser.parse_args(argv)
    try:
        _serve(arguments)
    except ConfigError as error:
        sys.stderr.write(f"nbagent-gateway-status: {error}\n")
        sys.exit(error.exit_status)


def _serve(arguments: argparse.Namespace) -> None:
    from nbagent.web import gunicorn_app

    gunicorn_app.configure_logging()
    # Nothing here takes longer than asking the hosts does.
    shape = gunicorn_app.Shape(workers=1, threads=32, graceful_s=5)
    gunicorn_app.GunicornApp(
        "nbagent-gateway-status", lambda: settings.load(arguments.config), lambda _: shape, make_app, arguments.bind
    ).run()


def make_app(found: GatewaySettings) -> WSGIApplication:
    """The landing page of the fleet, and what is said of a host that does not answer."""
    from nbagent.landing.app import create_app

    backend = haproxy.all_hosts(found)
    runtime = Runtime(haproxy.LOOK_SOCKET)
    fleet = FleetBackend(lambda: runtime.servers(backend))
    # A claim comes here only when the hosts have refused it; its token does not matter then.
    landing = create_app(found.landing, fleet, lambda _: True)
    return silent_hosts(landing, fleet.knows, Path(haproxy.PAGES))


def silent_hosts(landing: WSGIApplication, knows: Callable[[str], bool], pages: Path) -> WSGIApplication:
    """`landing`, but 503 for a slot of a host that there is: HAProxy sends it here when it cannot reach the host."""

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
