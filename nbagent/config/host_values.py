# SPDX-License-Identifier: BSD-3-Clause
"""Parsers of single settings of a host. Each returns the value, or raises ValueError with the expected one."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network
from typing import TypeVar

from nbagent.config.schema import Network, matching, positive_duration
from nbagent.core import proxies, urls
from nbagent.core.proxies import HttpProxy
from nbagent.core.quantities import QUOTA_EXPECTED, parse_quota

# Networks of a slot: only loopback, or the public internet by NAT on the host.
NETWORK_MODES = ("none", "internet")

_DNS_NAME = re.compile(
    r"(?=.{1,253}$)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9])?\.)+[a-z](?:[a-z0-9-]{0,61}[a-z0-9])"
)

N = TypeVar("N", IPv4Network, IPv6Network)


def quota(value: object) -> str:
    """A CPU quota, kept as it is given: a fraction of the host, or a percentage of one processor."""
    if value == "none":
        return "none"
    try:
        parse_quota(value, 1 << 20)
    except ValueError:
        raise ValueError(f'"none" or {QUOTA_EXPECTED}') from None
    return str(value)


def origins(value: object) -> tuple[str, ...]:
    """Web origins that may use the API, or `*`."""
    pattern = r"\*|https?://[^/\s]+"
    if isinstance(value, list) and all(isinstance(v, str) and re.fullmatch(pattern, v) for v in value):
        return tuple(value)
    raise ValueError('a list of origins such as ["https://example.org"], without a path')


def cookies(value: object) -> tuple[str, ...]:
    """Names of cookies; a `*` at the end is for any end."""
    expected = 'a list of at most 16 names of cookies such as ["_xsrf", "session-*"]'
    parse = matching(r"[A-Za-z0-9_.-]{1,64}\*?", expected)
    if isinstance(value, list) and len(value) <= 16:
        return tuple(map(parse, value))
    raise ValueError(expected)


def sentence(low: int, high: int) -> Callable[[object], str]:
    """A parser of a text of `low` to `high` characters in one line."""
    return matching(rf"[^\x00-\x1f\x7f]{{{low},{high}}}", f"text of {low} to {high} characters in one line")


def archives(value: object) -> tuple[str, ...]:
    """URLs below which archives of claims may be."""
    expected = 'a list of URLs such as ["https://data.example.org/courses/"], without "?", "#" or ".."'
    if not isinstance(value, list) or not all(isinstance(v, str) and "?" not in v for v in value):
        raise ValueError(expected)
    try:
        return tuple(value) if [urls.parse(item) for item in value] else ()
    except ValueError:
        raise ValueError(expected) from None


def network_mode(value: object) -> str:
    """One of NETWORK_MODES."""
    if value in NETWORK_MODES:
        return str(value)
    raise ValueError('"none" or "internet"')


def network_modes(value: object) -> tuple[str, ...]:
    """One or both of NETWORK_MODES, the default first."""
    if isinstance(value, list) and all(mode in NETWORK_MODES for mode in value) and len(value) == len(set(value)) > 0:
        return tuple(value)
    raise ValueError('a list with "none", "internet" or both, the default first')


def reach(value: object) -> tuple[str | Network, ...]:
    """DNS names and networks."""
    expected = 'a list of names and networks such as ["pip.example", "203.0.113.0/24"]'
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(expected)
    found: list[str | Network] = []
    for item in value:
        try:
            found.append(ipaddress.ip_network(item))
        except ValueError as error:
            if not _DNS_NAME.fullmatch(item):
                raise ValueError(f"{expected}; {error}") from None
            found.append(item)
    return tuple(found)


def http_proxy(value: object) -> HttpProxy:
    """Address and port of an HTTP proxy."""
    if isinstance(value, str):
        return proxies.parse(value)
    raise ValueError(proxies.EXPECTED)


def prefix_range(kind: type[N], shortest: int, longest: int) -> Callable[[object], N]:
    """A parser of a network with a prefix of so many bits."""

    def parse(value: object) -> N:
        with contextlib.suppress(ValueError):
            network = ipaddress.ip_network(value) if isinstance(value, str) else None
            if isinstance(network, kind) and shortest <= network.prefixlen <= longest:
                return network
        raise ValueError(f"an {kind.__name__[:4]} network with a prefix of {shortest} to {longest} bits")

    return parse


def addresses(value: object) -> tuple[str, ...]:
    """One to eight IP addresses."""
    expected = 'a list of IP addresses such as ["10.1.0.7", "2001:db8::7"]'
    if not isinstance(value, list) or not 1 <= len(value) <= 8:
        raise ValueError(expected)
    try:
        return tuple(str(ipaddress.ip_address(matching(".+", expected)(item))) for item in value)
    except ValueError:
        raise ValueError(expected) from None


def record_ttl(value: object) -> int:
    """The time to live of a DNS record, in whole seconds."""
    ttl_s = positive_duration(value)
    if not 1 <= ttl_s <= 3600:
        raise ValueError("a time from 1s to 1h")
    return round(ttl_s)
