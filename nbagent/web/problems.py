# SPDX-License-Identifier: BSD-3-Clause
"""Errors as RFC 9457 problem documents, with the status and the headers that belong to them.

`type` is `urn:nbagent:problem:CODE`. CODE is stable: it is the code of the NbagentError, or for an error
that Werkzeug raises (no such path, method or media type) the one in HTTP_CODES. Any other exception is
logged, and its response names no detail of it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus

from flask import Flask, Response
from werkzeug.exceptions import HTTPException

from nbagent.core.errors import NbagentError, Unauthenticated
from nbagent.web.responses import json_response

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


def from_error(error: NbagentError) -> Response:
    """The problem document of an NbagentError, with its details."""
    response = problem(error.code, error.title, error.http_status, str(error), error.details)
    retry_after_s = error.details.get("retry_after_s")
    if isinstance(retry_after_s, (int, float)):
        response.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if isinstance(error, Unauthenticated):
        response.headers["WWW-Authenticate"] = 'Bearer realm="nbagent"'
    return response


def from_http_exception(error: HTTPException) -> Response:
    """The problem document of an error that Werkzeug raised, with its headers, such as Allow."""
    status = error.code or 500
    code = HTTP_CODES.get(status, "bad-request" if status < 500 else "internal")
    response = problem(code, error.name, status, error.description or error.name)
    for name, value in error.get_headers():
        if name.lower() not in ("content-type", "content-length"):
            response.headers[name] = value
    return response


def for_status(status: int, detail: str, *, is_body: bool) -> Response:
    """The problem document of a request that the server refuses, because of its body or of its head."""
    code = "invalid-body" if is_body and status == 400 else HTTP_CODES.get(status, "bad-request")
    return problem(code, HTTPStatus(status).phrase, status, detail)


def from_unexpected(error: Exception) -> Response:
    """Logs an exception that no handler expects, and returns a problem document without its text."""
    log_unexpected(error)
    return problem("internal", NbagentError.title, 500, "the service failed; its journal has the traceback")


def log_unexpected(error: Exception) -> None:
    """Logs the traceback of an exception that no handler expects."""
    _LOG.error("a request failed with an unexpected exception", exc_info=error)


def register(app: Flask) -> None:
    """Makes every error of `app` a problem document."""
    app.register_error_handler(NbagentError, from_error)
    app.register_error_handler(HTTPException, from_http_exception)
    app.register_error_handler(Exception, from_unexpected)


def problem(code: str, title: str, status: int, detail: str, details: Mapping[str, object] | None = None) -> Response:
    """One problem document; `details` cannot replace its standard members."""
    standard = {"type": TYPE_PREFIX + code, "title": title, "status": status, "detail": detail}
    return json_response({**standard, **(details or {}), **standard}, status, MEDIA_TYPE)
