"""Errors as RFC 9457 problem documents, with the status and the headers that belong to them.

`type` is `urn:nbagent:problem:CODE`, and CODE is stable: that of the NbagentError, or that of
HTTP's own refusals in HTTP_CODES. An error nobody foresaw is logged, and its caller learns no
more than that it happened.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from flask import Flask
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response

from nbagent.api.responses import json_response
from nbagent.core.errors import NbagentError, Unauthenticated

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:nbagent:problem:"
HTTP_CODES = {
    400: "bad-request",
    404: "not-found",
    405: "method-not-allowed",
    413: "invalid-body",
    415: "invalid-body",
}
_LOG = logging.getLogger(__name__)


def problem_of_error(error: NbagentError) -> Response:
    """The answer to a request that failed in a way that nbagent can explain."""
    response = _problem(error.code, error.title, error.http_status, str(error), error.details)
    retry_after_s = error.details.get("retry_after_s")
    if isinstance(retry_after_s, (int, float)):
        response.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if isinstance(error, Unauthenticated):
        response.headers["WWW-Authenticate"] = 'Bearer realm="nbagent"'
    return response


def problem_of_http(error: HTTPException) -> Response:
    """The answer to a request that HTTP itself refuses: no such path, method or media type."""
    status = error.code or 500
    code = HTTP_CODES.get(status, "bad-request" if status < 500 else "internal")
    response = _problem(code, error.name, status, error.description or error.name, {})
    for name, value in error.get_headers():
        if name.lower() not in ("content-type", "content-length"):
            response.headers[name] = value
    return response


def problem_of_surprise(error: Exception) -> Response:
    """The answer to a request that met a bug."""
    _LOG.error("a request met a bug", exc_info=error)
    return _problem("internal", NbagentError.title, 500, "the API met a bug; its journal says more", {})


def register(app: Flask) -> None:
    """Makes every error of `app` a problem document."""
    app.register_error_handler(NbagentError, problem_of_error)
    app.register_error_handler(HTTPException, problem_of_http)
    app.register_error_handler(Exception, problem_of_surprise)


def _problem(code: str, title: str, status: int, detail: str, details: dict[str, Any]) -> Response:
    standard = {"type": TYPE_PREFIX + code, "title": title, "status": status, "detail": detail}
    return json_response({**standard, **details, **standard}, status, MEDIA_TYPE)
