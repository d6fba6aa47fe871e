# SPDX-License-Identifier: BSD-3-Clause
"""CORS: the headers that let pages of allowed origins call a service and read its responses."""

from __future__ import annotations

from collections.abc import Iterable

from flask import Response
from werkzeug.wrappers import Request

PREFLIGHT_MAX_AGE_S = 600


class AllowedOrigins:
    """The origins of an `allowed_origins` setting, in which "*" stands for every origin."""

    def __init__(self, origins: Iterable[str]) -> None:
        self.origins = frozenset(origin.lower() for origin in origins)

    def allow(self, origin: str | None) -> bool:
        """Whether a page of `origin` may call; None is a request that names no origin."""
        return "*" in self.origins or (origin is not None and origin.lower() in self.origins)

    def of_request(self, request: Request) -> str | None:
        """The Origin of a request when it is an allowed one."""
        origin = request.headers.get("Origin")
        return origin if origin and self.allow(origin) else None

    def add_headers(self, request: Request, response: Response) -> None:
        """Lets a page of an allowed origin read the response and its Retry-After."""
        if self.origins:
            response.headers["Vary"] = "Origin"
        if origin := self.of_request(request):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "Retry-After"


def add_preflight_headers(response: Response, methods: str) -> None:
    """Permits a request of a page by one of `methods`, for the response to its preflight."""
    response.headers["Access-Control-Allow-Methods"] = methods
    response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, Idempotency-Key"
    response.headers["Access-Control-Max-Age"] = str(PREFLIGHT_MAX_AGE_S)
