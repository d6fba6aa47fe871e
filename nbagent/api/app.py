"""The Flask application: registers the route table, and puts around every answer what all share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flask import Flask, Response, request
from werkzeug.exceptions import MethodNotAllowed
from werkzeug.wrappers import Response as AnyResponse

from nbagent.api import inputs, problems
from nbagent.api.access import TOKEN_PATH, Access
from nbagent.api.responses import json_response
from nbagent.api.route import Call, Route, Service
from nbagent.api.routes import ROUTES
from nbagent.config.host_config import HostConfig
from nbagent.core.errors import Forbidden
from nbagent.web.tokens import TokenFile
from nbagent.wire.control import ControlClient

PROBE_TIMEOUT_S = 3.0
PREFLIGHT_MAX_AGE_S = 600


def create_app(config: HostConfig, client: ControlClient, token_path: Path = TOKEN_PATH) -> Flask:
    """The API as a WSGI application that asks the supervisor through `client`."""
    app = Flask(__name__, static_folder=None)
    # A path is one of the table or it is none: no redirect to a tidier spelling.
    app.url_map.merge_slashes = False
    service = Service(config, client, ControlClient(client.path, PROBE_TIMEOUT_S))
    access = Access(config, TokenFile(token_path))
    routes = {route.name: route for route in ROUTES}
    for route in ROUTES:
        app.add_url_rule(
            flask_path(route.path), route.name, _view(route, service),
            methods=[route.method], provide_automatic_options=False,
            # What tmpnb's clients call, some of them write with a slash behind it.
            strict_slashes=not route.path.startswith("/api/"),
        )
    for rule in app.url_map.iter_rules():
        # Werkzeug answers HEAD by GET, but a HEAD of /claim would hand out a slot.
        if routes[rule.endpoint].changes and rule.methods:
            rule.methods.discard("HEAD")
    problems.register(app)

    @app.before_request
    def admit() -> AnyResponse | None:
        if request.method == "OPTIONS":
            return _options_answer(access)
        route = routes.get(request.endpoint or "")
        if route is not None and not route.is_open:
            access.admit(request, route.changes)
        return None

    @app.after_request
    def finish(response: Response) -> Response:
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Content-Type-Options"] = "nosniff"
        if access.origins:
            response.headers["Vary"] = "Origin"
        if origin := access.allowed_origin(request):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "Retry-After"
        return response

    return app


def flask_path(path: str) -> str:
    """A path of the table as Flask writes it.

    Whatever stands below /slots/ is taken as an id, so that `../` is refused as one.
    """
    return path.replace("{slot}", "<path:slot>")


def _options_answer(access: Access) -> AnyResponse | None:
    """The answer to OPTIONS: what the path allows, and to a preflight whether its origin may."""
    refusal = request.routing_exception
    if not isinstance(refusal, MethodNotAllowed):
        return None
    methods = ", ".join(sorted({*(refusal.valid_methods or ()), "OPTIONS"}))
    answer = Response(status=204, headers={"Allow": methods})
    del answer.headers["Content-Type"]
    if "Origin" in request.headers:
        if access.allowed_origin(request) is None:
            raise Forbidden("this web origin is not in api.allowed_origins")
        answer.headers["Access-Control-Allow-Methods"] = methods
        answer.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, Idempotency-Key"
        answer.headers["Access-Control-Max-Age"] = str(PREFLIGHT_MAX_AGE_S)
    return answer


def _view(route: Route, service: Service) -> Callable[..., Any]:
    def view(slot: str = "") -> AnyResponse:
        call = Call(
            request,
            inputs.read_options(request, route.fields),
            slot and inputs.check_slot_id(slot, service.config.label),
            inputs.read_key(request) if route.takes_key else None,
        )
        answer = route.answer(service, call)
        return answer if isinstance(answer, AnyResponse) else json_response(answer)

    return view
