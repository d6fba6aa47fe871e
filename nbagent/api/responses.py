"""What goes back: JSON in one line, and the origin of a claimed slot."""

from __future__ import annotations

import json
import socket
from typing import Any

from flask import Response

from nbagent.api.hostnames import host_of
from nbagent.config.host_config import RouterSettings


def json_response(document: Any, status: int = 200, media_type: str = "application/json") -> Response:
    """`document` as JSON that ends its line, since many read it in a terminal."""
    # Details of an error may hold what JSON does not know; their text is better than a failure.
    text = json.dumps(document, separators=(",", ":"), default=str)
    return Response(text + "\n", status, content_type=media_type)


def front(router: RouterSettings, slot: str, host_header: str) -> str:
    """The origin of a slot: what the operator says, else the name this API was called by."""
    host = router.domain or host_of(host_header) or socket.gethostname()
    scheme, _, authority = (router.public_url or f"http://{host}:{router.port}").partition("://")
    return f"{scheme}://{slot}.{authority}" if router.domain else f"{scheme}://{authority}"
