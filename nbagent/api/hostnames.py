# SPDX-License-Identifier: BSD-3-Clause
"""Host names: in a Host header, in an Origin, of this machine, and in the URL of a claimed slot.

Host and Origin are text that a caller chose. Text that is neither a name nor an address becomes None,
so that it is never echoed.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from nbagent.config.host_config import RouterSettings

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_.-]{1,253})(?::\d{1,5})?")
_RESOLVER = Path("/etc/resolv.conf")


def host_of(header: str) -> str | None:
    """The name or address in a Host header, without its port; an IPv6 address in brackets."""
    match = _HOST.fullmatch(header)
    if match is None or (match[1].startswith("[") and not is_address(match[1])):
        return None
    return match[1].lower()


def is_address(host: str) -> bool:
    """Whether `host` is an IP literal, as a URL writes it."""
    try:
        ipaddress.ip_address(host[1:-1] if host.startswith("[") else host)
    except ValueError:
        return False
    return True


def plain_address(peer: str) -> str:
    """A peer's address, in which the IPv4-mapped IPv6 address of a dual-stack socket becomes IPv4."""
    try:
        mapped = ipaddress.IPv6Address(peer).ipv4_mapped
    except ValueError:
        return peer
    return peer if mapped is None else str(mapped)


def origin_of(url: str) -> str | None:
    """The origin of a URL, such as a Referer, or None when it has none."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return f"{parts.scheme}://{parts.netloc}".lower() if parts.scheme and parts.netloc else None


def machine_names(resolver: Path = _RESOLVER) -> frozenset[str]:
    """The host names of this machine, from its own files because the DNS may be down when the service starts."""
    full = socket.gethostname().lower()
    short = full.partition(".")[0]
    return frozenset({full, short, *(f"{short}.{domain}" for domain in _search_domains(resolver))})


def slot_origin(router: RouterSettings, slot: str, host_header: str) -> str:
    """The origin of a slot: router.public_url or router.domain, else the host by which the API was called."""
    host = router.domain or host_of(host_header) or socket.gethostname()
    scheme, _, authority = (router.public_url or f"http://{host}:{router.port}").partition("://")
    return f"{scheme}://{slot}.{authority}" if router.domain else f"{scheme}://{authority}"


def assets_address(router: RouterSettings, path: str | None) -> str | None:
    """The address at which pages of slots request the image's web files, whose path on the router is `path`.

    A path when slots have the origin of the landing page.
    """
    if path is None:
        return None
    if router.assets_url:
        return router.assets_url + path
    return slot_origin(router, "assets", "") + path if router.domain else path


def _search_domains(resolver: Path) -> Iterator[str]:
    try:
        lines = resolver.read_text(errors="replace").splitlines()
    except OSError:
        return
    for keyword, *domains in filter(None, map(str.split, lines)):
        if keyword in ("search", "domain"):
            yield from (domain.strip(".").lower() for domain in domains if domain.strip("."))
