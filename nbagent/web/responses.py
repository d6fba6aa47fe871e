# SPDX-License-Identifier: BSD-3-Clause
"""JSON responses, and the headers that every response has."""

from __future__ import annotations

import json

from flask import Response


def json_response(document: object, status: int = 200, media_type: str = "application/json") -> Response:
    """`document` as one line of JSON, which ends with a line feed because many callers read it in a terminal."""
    # The details of an error may hold values that JSON has no type for; str() keeps the response from failing.
    text = json.dumps(document, separators=(",", ":"), default=str)
    return Response(text + "\n", status, content_type=media_type)


def forbid_caching_and_sniffing(response: Response) -> None:
    """Responses carry tokens and figures of the moment, so no cache may keep them."""
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
