"""Who may call: a peer on a trusted network, or a bearer of the token; never a foreign web page.

Three questions, in this order:

1. Is it a web page of another site? A browser sends what any page tells it to, from inside the
   trusted network. Such a request names its `Origin`, or says `Sec-Fetch-Site`. Plain HTTP to
   anything but localhost lacks the latter, and an <img> lacks the former: there `GET /claim`,
   the only GET that changes something, is refused to whatever calls itself a browser.
2. Does it carry a token? Then the token alone decides: a page cannot add an `Authorization`
   header to a foreign request without a preflight, which only allowed origins pass.
3. Is the peer's address trusted? It says nothing when a proxy made the connection, so any trace
   of a proxy voids it. Nor may `Host` be a name that only the caller knows: by DNS rebinding a
   page makes its own name resolve to this host, and is then of the same origin as the API. An
   attacker can register neither an IP literal, nor localhost, nor a name of this machine.
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
from nbagent.web.tokens import TokenFile, bearer_token

TOKEN_PATH = paths.TOKEN
# Of the landing page: what it opens is a slot, and nothing of this API.
LANDING_TOKEN_PATH = paths.LANDING_TOKEN
_PROXY_HEADERS = frozenset({"forwarded", "via", "x-real-ip", "true-client-ip", "cf-connecting-ip"})


class Access:
    """Judges requests by the `[api]` settings, the machine's names and the token."""

    def __init__(self, config: HostConfig, token: TokenFile, names: Iterable[str] | None = None) -> None:
        self.networks = config.api.trusted_networks
        self.origins = frozenset(origin.lower() for origin in config.api.allowed_origins)
        self.token = token
        public = filter(None, (config.router.public_url, *config.api.allowed_origins))
        self.names = frozenset(machine_names() if names is None else names) | {
            host for url in public if (host := host_of(url.partition("://")[2]))
        }

    def admit(self, request: Request, changes: bool) -> None:
        """Returns when the request may be answered. Raises Forbidden or Unauthenticated."""
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
                "called by a name that is not this host's: call by address, by its hostname or by"
                " the host of router.public_url, or send the token"
            )

    def allowed_origin(self, request: Request) -> str | None:
        """The origin to name in CORS headers, if the request has one that may read the answer."""
        origin = request.headers.get("Origin")
        return origin if origin and self._allowed(origin) else None

    def _allowed(self, origin: str | None) -> bool:
        return "*" in self.origins or (origin is not None and origin.lower() in self.origins)

    def _refuse_cross_site(self, request: Request, browser_may_not: bool) -> None:
        headers = request.headers
        origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site")
        source = origin or origin_of(headers.get("Referer", ""))
        if self._allowed(source):
            return
        own = source == f"{request.scheme}://{headers.get('Host', '')}".lower() and self._known_host(request)
        if origin is not None and not own:
            raise Forbidden("this web origin is not in api.allowed_origins", origin=origin[:200])
        if site in ("cross-site", "same-site"):
            raise Forbidden(f"a {site} request of a web page whose origin is not in api.allowed_origins")
        if browser_may_not and site is None and not own and "Mozilla/" in headers.get("User-Agent", ""):
            raise Forbidden("a browser may not claim by GET over plain HTTP; use POST or send the token")

    def _trusted_peer(self, request: Request) -> bool:
        for name, _ in request.headers:
            if name.lower() in _PROXY_HEADERS or name.lower().startswith("x-forwarded"):
                return False
        return is_trusted(request.remote_addr or "", self.networks)

    def _known_host(self, request: Request) -> bool:
        # HTTP/1.0 has no Host, and no browser speaks it.
        header = request.headers.get("Host", "")
        host = host_of(header)
        if host is None:
            return not header
        host = host.rstrip(".")
        return is_address(host) or host == "localhost" or host.endswith(".localhost") or host in self.names


def is_trusted(peer: str, networks: Iterable[Network]) -> bool:
    """Whether the address `peer` is in one of `networks`; an IPv4-mapped one counts as IPv4."""
    try:
        address = ipaddress.ip_address(plain_address(peer))
    except ValueError:
        return False
    return any(address in network for network in networks)
