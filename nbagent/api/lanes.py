# SPDX-License-Identifier: BSD-3-Clause
"""The lanes of the API's processes: trusted callers, strangers and the landing page share no thread.

Only the listening socket selects the landing page, so that no path, header or address of a request can. The address of
a peer selects between trusted callers and strangers before anything is read; a stranger's request with the valid token
is computed by a thread of the trusted callers, since a claim may wait for a start.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from nbagent.api.access import is_trusted
from nbagent.config.host_config import ApiSettings
from nbagent.core.claim_content import BODY_MAX_BYTES
from nbagent.web.server import Lane, Service
from nbagent.web.tokens import TokenFile, bearer_token

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

# A request of a stranger without a token is refused or is one of the open routes, which wait for nothing.
STRANGERS_THREADS = 4


def make_service(
    settings: ApiSettings, api: WSGIApplication, token: TokenFile, landing_socket: str, landing: WSGIApplication
) -> Service:
    """The control API `api`, and `landing` for connections to the unix socket `landing_socket`."""
    trusted = Lane(api, settings.threads)

    def promote(environ: WSGIEnvironment) -> Lane | None:
        given = bearer_token(environ.get("HTTP_AUTHORIZATION", ""))
        return trusted if given is not None and token.matches(given) else None

    strangers = Lane(api, STRANGERS_THREADS, promote)
    # The router is its only peer. It receives the body of a request before it connects.
    visitors = Lane(landing, settings.threads, address_connections=None)

    @functools.lru_cache(4096)
    def lane_of(listener: object, peer: str) -> Lane:
        if listener == landing_socket:
            return visitors
        return trusted if is_trusted(peer, settings.trusted_networks) else strangers

    return Service(lane_of, BODY_MAX_BYTES)
