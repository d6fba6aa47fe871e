# SPDX-License-Identifier: BSD-3-Clause
"""The network of slots: routes, proxy, firewall, host names and DNS records."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from nbagent.config import host_config
from nbagent.core import model, urls
from nbagent.core.errors import ConfigError
from nbagent.core.proxies import HttpProxy
from nbagent.doctor.finding import Finding
from nbagent.doctor.system import TIMEOUT_S, text_of
from nbagent.network import foreign
from nbagent.network.addresses import FIRST, forwards_ipv6, gateway, ipv6_uplink
from nbagent.network.rules import TABLE

# A name that no DNS has (RFC 6761), for which a proxy responds with an error of its own.
PROXY_NAME = "nbagent.invalid"
PROXY_REFUSES, PROXY_LOGIN = 403, 407
# A proxy may wait for its resolver.
PROXY_TIMEOUT_S = 10.0
# One question: version.bind, type TXT, class CHAOS.
VERSION_QUERY = b"\x4e\x42\0\0\0\1" + bytes(6) + b"\7version\4bind\0\0\x10\0\3"


def check_network(root: Path, settings: host_config.HostConfig) -> Finding:
    """The networks that slots may reach, and whether the host has a route to them."""
    if "internet" not in settings.network.allow:
        return Finding("network", "ok", "slots have no network")
    ipv4, ipv6 = bool(_ipv4_uplink(root)), forwards_ipv6(root)
    by = f", and by the proxy {settings.network.proxy}" if settings.network.proxy is not None else ""
    if ipv4 and ipv6:
        return Finding("network", "ok", f"slots may reach the internet over IPv4 and IPv6{by}")
    if ipv4:
        more = "IPv6 would require net.ipv6.conf.all.forwarding=1 and a default route"
        return Finding("network", "ok", f"slots may reach the internet over IPv4{by}; {more}")
    if ipv6:
        return Finding("network", "ok", f"slots may reach the internet over IPv6 only, as this host may{by}")
    if by:
        return Finding("network", "ok", f"slots may reach the internet by the proxy {settings.network.proxy} only")
    if uplink := ipv6_uplink(root):
        return Finding(
            "network", "warn",
            "the host has a default route of IPv6 only and does not forward IPv6, so slots cannot reach the internet",
            f"sysctl -w net.ipv6.conf.{uplink}.accept_ra=2 net.ipv6.conf.all.forwarding=1, and in /etc/sysctl.d",
        )
    return Finding(
        "network", "warn", "the host has no default route, so slots cannot reach the internet",
        'give the host a default route, or set network.allow to ["none"]',
    )


def check_proxy(root: Path, settings: host_config.HostConfig, proxy: HttpProxy) -> Finding:
    """Whether the HTTP proxy responds, and connects to the first of claims.archives, if there are any."""
    name, shown = "proxy", f"network.proxy, {proxy},"
    if _is_own(proxy.address, socket.AF_INET6 if proxy.version == 6 else socket.AF_INET):
        return Finding(
            name, "fail", f"{shown} is an address of this host, which slots do not reach",
            "use a proxy on another machine, because one on this host would connect slots to its own services",
        )
    if proxy.version == 6 and not forwards_ipv6(root):
        return Finding(
            name, "fail", f"{shown} has an IPv6 address, and the host does not forward IPv6 for slots",
            "sysctl -w net.ipv6.conf.all.forwarding=1, and in /etc/sysctl.d; or use an IPv4 address",
        )
    archives = settings.claims.archives
    url = urls.parse(archives[0]) if archives else urls.parse(f"http://{PROXY_NAME}/")
    try:
        status = _status_by(proxy, url)
    except (OSError, http.client.HTTPException) as error:
        return Finding(
            name, "fail", f"no response by {proxy} for {url.absolute}: {error}",
            "check the address, the proxy's log, and that it permits this host; or correct network.proxy",
        )
    if status == PROXY_LOGIN:
        return Finding(
            name, "fail", f"{proxy} requires a login, which slots do not have",
            "permit the address of this host without a login",
        )
    if status == PROXY_REFUSES and archives:
        mend = "permit the host of claims.archives in the proxy's rules"
        return Finding(name, "warn", f"{proxy} may refuse {url.absolute}: status {status}", mend)
    return Finding(name, "ok", f"{proxy} responds with status {status} for {url.absolute}")


def _is_own(address: str, family: socket.AddressFamily) -> bool:
    """Whether an address is one of this host: the kernel then uses it as the source of packets to itself."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # The port has no effect.
            probe.connect((address, 53))
        except OSError:  # no route
            return False
        return bool(probe.getsockname()[0] == address)


def _status_by(proxy: HttpProxy, url: urls.Url) -> int:
    """The status of a HEAD request by a proxy. Raises OSError or HTTPException."""
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(proxy.address, proxy.port, timeout=PROXY_TIMEOUT_S)
    if url.scheme == "https":
        connection.set_tunnel(url.host, url.port)
    try:
        connection.request("HEAD", url.target if url.scheme == "https" else url.absolute)
        return connection.getresponse().status
    finally:
        connection.close()


def _ipv4_uplink(root: Path, address: str = "0.0.0.0") -> str:
    """The interface of the most specific IPv4 route to an address, by default that of the default route; empty without
    one."""
    best = (-1, "")
    for line in text_of(root / "proc/net/route", "").splitlines()[1:]:
        route = line.split()
        # In hexadecimal digits, in the order of bytes of this machine.
        to, mask = (int.from_bytes(int(route[column], 16).to_bytes(4, sys.byteorder), "big") for column in (1, 7))
        if int(ipaddress.ip_address(address)) & mask == to:
            best = max(best, (mask, route[0]))
    return best[1]


def check_firewall(root: Path, settings: host_config.NetworkSettings, rules: Callable[[], tuple[str, str]]) -> Finding:
    """Whether nftables has our table, and no other table drops packets of slots.

    `rules` returns the ruleset as JSON and as text, for nbagent.network.foreign.
    """
    document, text = rules()
    found = foreign.Ruleset(json.loads(document), text)
    if TABLE not in found.tables:
        return Finding("firewall", "fail", f"nftables has no table {TABLE}", "systemctl restart nbagent-network")
    resolver, slot4, slot6 = gateway(settings.range4), str(settings.range4[FIRST]), str(settings.range6[FIRST])
    packets = foreign.packets(4, _ipv4_uplink(root), slot4, resolver)
    if forwards_ipv6(root):
        packets += foreign.packets(6, ipv6_uplink(root), slot6, resolver)
    if (proxy := settings.proxy) is not None and proxy.version == 4:
        packets += foreign.packets(4, _ipv4_uplink(root, proxy.address), slot4, resolver, proxy)[:2]
    dropping = list(found.dropping(packets))
    if not dropping:
        return Finding("firewall", "ok", "no other table drops packets of slots")
    return Finding("firewall", "warn", "; ".join(map(str, dropping)), foreign.remedy(dropping))


def check_resolver(address: str, port: int = 53) -> Finding:
    """Whether the resolver of slots responds, by a question that it forwards to no server: its version."""
    name, unit = "resolver of slots", "nbagent-dns.service"
    if not _is_own(address, socket.AF_INET):
        return Finding(name, "ok", f"not in use: no interface has its address {address}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.settimeout(TIMEOUT_S)
        try:
            connection.connect((address, port))
            connection.send(VERSION_QUERY)
            connection.recv(512)
        except OSError as error:
            mend = f"systemctl restart {unit}; journalctl -eu {unit}"
            return Finding(name, "fail", f"no response from {address}: {error}", mend)
    return Finding(name, "ok", f"responds on {address}")


def check_wildcard(domain: str, resolve: Callable[[str], list[str]]) -> Finding:
    """Whether the host names of slots resolve; `resolve` returns the addresses of a name."""
    # A random name, because the response for a fixed one could come from a cache or from a record of its own.
    name = f"{model.new_id('doctor')}.{domain}"
    try:
        addresses = resolve(name)
    except OSError as error:
        return Finding(
            "host names of slots", "fail", f"{name} does not resolve: {error.strerror}",
            f"add a DNS record *.{domain} with the address of this host or of the proxy in front of it",
        )
    return Finding("host names of slots", "ok", f"*.{domain} resolves to {', '.join(addresses)}")


def check_dns(settings: host_config.HostConfig, key: Path) -> Finding:
    """Whether the DNS server accepts the records of this host and has those that belong to the state of the agent."""
    from nbagent.dns import require_library

    name = "DNS records"
    if key.exists() and not os.access(key, os.R_OK):
        return Finding(name, "warn", f"no permission to read {key}", "run nbagent doctor as root")
    try:
        require_library()
    except ConfigError as error:
        return Finding(name, "fail", str(error), "apt install python3-dnspython")
    from nbagent.dns import check
    from nbagent.dns.publisher import agent_state

    result = list(check.check_host(settings, agent_state, key))[-1]
    return Finding(
        name, result.status, result.found, "" if result.status == "ok" else "journalctl -eu nbagent-dns-update"
    )
