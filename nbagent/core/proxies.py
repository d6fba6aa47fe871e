# SPDX-License-Identifier: BSD-3-Clause
"""The HTTP proxy of `network.proxy`, and the environment variables by which programs find it.

It is given by its IP address, so that no name decides where connections of slots lead, and has no login, because each
program of a slot could read that. Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

EXPECTED = (
    'the IP address and the port of an HTTP proxy on another machine, such as "10.1.0.8:3128" or "[2001:db8::8]:3128", '
    "without a name or a login"
)
# Every program accepts the names in lower case; curl ignores HTTP_PROXY in upper case.
_VARIABLES = ("http_proxy", "https_proxy")
_WITHOUT = "no_proxy"
_OWN = ("localhost", "127.0.0.1", "::1")


class HttpProxy(NamedTuple):
    """An HTTP proxy."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.version == 6 else f"{self.address}:{self.port}"

    @property
    def version(self) -> int:
        """4 or 6."""
        return ipaddress.ip_address(self.address).version

    def serves(self, host: str, direct: Iterable[str]) -> bool:
        """Whether connections to `host` are made by the proxy: not to the slot itself, nor to the networks `direct`."""
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return host not in _OWN
        return not address.is_loopback and not any(address in ipaddress.ip_network(network) for network in direct)


def parse(text: str) -> HttpProxy:
    """The proxy of an address with a port, with or without "http://". Raises ValueError with the expected syntax."""
    match = re.fullmatch(r"(?:http://)?(?:\[([0-9a-fA-F:]+)\]|([0-9.]+)):([0-9]{1,5})/?", text)
    try:
        address = ipaddress.ip_address((match[1] or match[2]) if match else "")
    except ValueError:
        raise ValueError(EXPECTED) from None
    port = int(match[3]) if match else 0
    local = address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified
    if local or getattr(address, "ipv4_mapped", None) is not None or not 1 <= port <= 65535:
        raise ValueError(EXPECTED)
    return HttpProxy(str(address), port)


def variables(proxy: HttpProxy, direct: Iterable[str]) -> dict[str, str]:
    """The environment variables of the proxy, for programs that reach the hosts and networks `direct` without it."""
    return dict.fromkeys(_VARIABLES, f"http://{proxy}") | {_WITHOUT: ",".join((*_OWN, *direct))}


def without_given(found: Mapping[str, str], given: Collection[str]) -> dict[str, str]:
    """Those of the variables `found` that `given` has in neither lower nor upper case."""
    return {name: value for name, value in found.items() if name not in given and name.upper() not in given}
