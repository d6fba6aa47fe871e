# SPDX-License-Identifier: BSD-3-Clause
"""The Flask application: the routes of the table, access control, CORS, and headers that every response has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flask import Flask, Response, request
from werkzeug.exceptions import MethodNotAllowed
from werkzeug.routing import Map
from werkzeug.wrappers import Response as AnyResponse

from nbagent.api import inputs
from nbagent.api.access import TOKEN_PATH, Access
from nbagent.api.route import Call, Route, Service
from nbagent.api.routes import ROUTES
from nbagent.config.host_config import HostConfig
from nbagent.core.errors import Forbidden
from nbagent.web import problems
from nbagent.web.cors import add_preflight_headers
from nbagent.web.responses import forbid_caching_and_sniffing, json_response
from nbagent.web.tokens import passed
from nbagent.wire.control import ControlClient

PROBE_TIMEOUT_S = 3.0


def create_app(config: HostConfig, client: ControlClient, token_path: Path = TOKEN_PATH) -> Flask:
    """The API as a WSGI application that calls the supervisor by `client`."""
    app = Flask(__name__, static_folder=None)
    # A path that is not in the table gets 404 and no redirect to a normalised spelling. Werkzeug 2.2 does not read the
    # attribute merge_slashes after the map is made.
    app.url_map = Map(merge_slashes=False)
    service = Service(config, client, ControlClient(client.path, PROBE_TIMEOUT_S))
    access = Access(config, passed(token_path))
    routes = {route.name: route for route in ROUTES}
    for route in ROUTES:
        app.add_url_rule(
            flask_path(route.path), route.name, _view(route, service),
            methods=[route.method], provide_automatic_options=False,
            # Some of tmpnb's clients end its paths with a slash.
            strict_slashes=not route.path.startswith("/api/"),
        )
    for rule in app.url_map.iter_rules():
        # Werkzeug serves HEAD by the view of GET, so a HEAD of /claim would hand out a slot.
        if routes[rule.endpoint].changes and rule.methods:
            rule.methods.discard("HEAD")
    problems.register(app)

    @app.before_request
    def admit() -> AnyResponse | None:
        if request.method == "OPTIONS":
            return _options_response(access)
        route = routes.get(request.endpoint or "")
        if route is not None and not route.is_open:
            access.admit(request, route.changes)
        return None

    @app.after_request
    def finish(response: Response) -> Response:
        forbid_caching_and_sniffing(response)
        access.origins.add_headers(request, response)
        return response

    return app


def flask_path(path: str) -> str:
    """A path of the table in Flask's syntax.

    A slot's id may have any number of segments, so that `../` below /slots/ is refused as a malformed id.
    """
    return path.replace("{slot}", "<path:slot>")


def _options_response(access: Access) -> AnyResponse | None:
    """The response to OPTIONS: the methods of the path, and to a preflight the CORS headers. Raises Forbidden."""
    error = request.routing_exception
    if not isinstance(error, MethodNotAllowed):
        return None
    methods = ", ".join(sorted({*(error.valid_methods or ()), "OPTIONS"}))
    response = Response(status=204, headers={"Allow": methods})
    del response.headers["Content-Type"]
    if "Origin" in request.headers:
        if access.origins.of_request(request) is None:
            raise Forbidden("the Origin of this web page is not in api.allowed_origins")
        add_preflight_headers(response, methods)
    return response


def _view(route: Route, service: Service) -> Callable[..., AnyResponse]:
    def view(slot: str = "") -> AnyResponse:
        call = Call(
            request,
            inputs.read_options(request, route.fields),
            slot and inputs.check_slot_id(slot),
            inputs.read_key(request) if route.takes_key else None,
        )
        answer = route.answer(service, call)
        return answer if isinstance(answer, AnyResponse) else json_response(answer)

    return view
