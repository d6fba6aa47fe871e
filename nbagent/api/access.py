# SPDX-License-Identifier: BSD-3-Clause
"""Access control: peers on a trusted network and bearers of the token may call, web pages of other origins may not.

The checks, in this order:

1. Cross-site requests. Any page can make a browser inside the trusted network send requests. Such a
   request has an `Origin` or a `Sec-Fetch-Site` header. Over plain HTTP browsers send the latter to
   localhost only, and an <img> sends no `Origin`; so a browser may not `GET /claim` there, which is
   the only GET that changes state.
2. The token. A request that carries one is judged by it alone, because a page cannot add an
   `Authorization` header to a cross-origin request without a preflight, which only allowed origins pass.
3. The peer's address. It is not the caller's when a proxy made the connection, so a header of a proxy
   voids trust in the address. `Host` must be a name of this host, because by DNS rebinding an
   attacker makes a domain resolve to this host, and a page of that domain then has the origin of the API.
   An attacker can register neither an IP literal, nor localhost, nor a name of this machine.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from werkzeug.wrappers import Request

from nbagent.api.hostnames import host_of, is_address, machine_names, origin_of, plain_address
from nbagent.config.host_config import HostConfig
from nbagent.config.schema import Network
from nbagent.core import paths
from nbagent.core.errors import Forbidden, Unauthenticated
from nbagent.web.cors import AllowedOrigins
from nbagent.web.tokens import TokenFile, bearer_token

TOKEN_PATH = paths.TOKEN
# The token of the landing page; it starts slots and gives no access to this API.
LANDING_TOKEN_PATH = paths.LANDING_TOKEN
_PROXY_HEADERS = frozenset({"forwarded", "via", "x-real-ip", "true-client-ip", "cf-connecting-ip"})


class Access:
    """Checks requests against the `[api]` settings, the names of the machine and the token."""

    def __init__(self, config: HostConfig, token: TokenFile, names: Iterable[str] | None = None) -> None:
        self.networks = config.api.trusted_networks
        self.origins = AllowedOrigins(config.api.allowed_origins)
        self.token = token
        public = filter(None, (config.router.public_url, *config.api.allowed_origins))
        self.names = frozenset(machine_names() if names is None else names) | {
            host for url in public if (host := host_of(url.partition("://")[2]))
        }

    def admit(self, request: Request, changes: bool) -> None:
        """Returns when the request is permitted. Raises Forbidden or Unauthenticated."""
        given = bearer_token(request.headers.get("Authorization", ""))
        self._refuse_cross_site(request, changes and request.method == "GET" and given is None)
        if given is not None:
            if not self.token.matches(given):
                raise Forbidden(f"the token is not the one in {self.token.path} on this host")
        elif not self._trusted_peer(request):
            raise Unauthenticated(
                f"send the token of {self.token.path} as 'Authorization: Bearer TOKEN'"
                " or call from a network in api.trusted_networks, without a proxy"
            )
        elif not self._known_host(request):
            raise Forbidden(
                "the Host header is not a name of this host: call it by its address, its hostname or"
                " the host of router.public_url, or send the token"
            )

    def _refuse_cross_site(self, request: Request, refuse_browsers: bool) -> None:
        headers = request.headers
        origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site")
        source = origin or origin_of(headers.get("Referer", ""))
        if self.origins.allow(source):
            return
        own = source == f"{request.scheme}://{headers.get('Host', '')}".lower() and self._known_host(request)
        if origin is not None and not own:
            raise Forbidden("the Origin of this web page is not in api.allowed_origins", origin=origin[:200])
        if site in ("cross-site", "same-site"):
            raise Forbidden(f"this is a {site} request of a web page whose origin is not in api.allowed_origins")
        if refuse_browsers and site is None and not own and "Mozilla/" in headers.get("User-Agent", ""):
            raise Forbidden("a browser may not claim by GET over plain HTTP; use POST, or send the token")

    def _trusted_peer(self, request: Request) -> bool:
        for name, _ in request.headers:
            if name.lower() in _PROXY_HEADERS or name.lower().startswith("x-forwarded"):
                return False
        return is_trusted(request.remote_addr or "", self.networks)

    def _known_host(self, request: Request) -> bool:
        # HTTP/1.0 requests have no Host, and browsers do not send them.
        header = request.headers.get("Host", "")
        host = host_of(header)
        if host is None:
            return not header
        host = host.rstrip(".")
        return is_address(host) or host == "localhost" or host.endswith(".localhost") or host in self.names


def is_trusted(peer: str, networks: Iterable[Network]) -> bool:
    """Whether the address `peer` is in one of `networks`; an IPv4-mapped IPv6 address counts as IPv4."""
    try:
        address = ipaddress.ip_address(plain_address(peer))
    except ValueError:
        return False
    return any(address in network for network in networks)
