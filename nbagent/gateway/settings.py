# SPDX-License-Identifier: BSD-3-Clause
"""The settings of a gateway: `/etc/nbagent/gateway.toml`, then `/etc/nbagent/gateway.d/*.toml` by name.

nbagent.config.schema reads and checks them as it does nbagent.toml. Each host of the fleet is a table `[hosts.LABEL]`,
so a host may have a file of its own in gateway.d; `nbagent gateway add-host` writes such a file.
"""

from __future__ import annotations

import ipaddress
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nbagent.config.host_config import LandingSettings
from nbagent.config.schema import (
    DnsServer,
    Network,
    Origin,
    Reader,
    auto_or,
    dns_domain,
    dns_server,
    flag,
    matching,
    networks,
    number,
    positive_duration,
    read_tables,
    rename_section,
    setting,
    tables,
    word_or,
)
from nbagent.core import paths

DEFAULT_PATH = paths.GATEWAY_SETTINGS
LABEL = r"[a-z0-9]{1,16}"
LABEL_EXPECTED = "1 to 16 characters of a-z and 0-9, the label of a host"
_LISTEN = re.compile(r"(\*|\d+\.\d+\.\d+\.\d+|\[[0-9a-f:]+\]):(\d{1,5})")


@dataclass(frozen=True)
class Listen:
    """An address with a port; "*" is every IPv4 address, "::" every IPv6 address."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def _listen(value: object) -> Listen:
    match = _LISTEN.fullmatch(value) if isinstance(value, str) else None
    try:
        if match and 1 <= int(match[2]) <= 65535:
            address = match[1].strip("[]")
            return Listen(address if address == "*" else str(ipaddress.ip_address(address)), int(match[2]))
    except ValueError:
        pass
    raise ValueError('an address with a port, such as "*:80", "[::]:80" or "127.0.0.1:8080"')


def _listens(value: object) -> tuple[Listen, ...]:
    expected = 'a list of addresses with ports, such as ["*:80", "[::]:80"]'
    if not isinstance(value, list):
        raise ValueError(expected)
    try:
        return tuple(map(_listen, value))
    except ValueError:
        raise ValueError(expected) from None


def _address(value: object) -> str:
    try:
        if isinstance(value, str):
            return str(ipaddress.ip_address(value))
    except ValueError:
        pass
    raise ValueError('an IP address such as "10.1.0.7"; to find hosts by DNS, use fleet.srv')


def _paths(value: object) -> tuple[str, ...]:
    expected = 'a list of files or directories such as ["/etc/letsencrypt/live/nb.example.org"]'
    if isinstance(value, list) and all(isinstance(v, str) and re.fullmatch(r"/[^\s\"'\\]+", v) for v in value):
        return tuple(value)
    raise ValueError(expected)


_PORT = number(1, 65535, int)
_SRV = matching(r"(_?[a-z0-9-]+\.){2,}[a-z0-9-]+", 'a name with SRV records such as "_nbagent._tcp.hosts.example.org"')


@dataclass(frozen=True)
class ListenSettings:
    """`[listen]`: addresses for browsers, and the proxies in front of the gateway."""

    http: tuple[Listen, ...] = setting(
        ["*:80", "[::]:80"], _listens,
        "Addresses for HTTP; if tls.certificates is set, requests are redirected to HTTPS."
    )
    https: tuple[Listen, ...] = setting(
        ["*:443", "[::]:443"], _listens, "Addresses for HTTPS, used if tls.certificates is set."
    )
    metrics: Listen | None = setting(  # noqa: RUF009  setting() returns a field
        "127.0.0.1:8405", word_or("none", _listen),
        "Address for HAProxy's own statistics, without a password: /metrics for Prometheus, /stats for browsers.",
    )
    trusted_proxies: tuple[Network, ...] = setting(
        [], networks, "Proxies in front whose X-Forwarded-For header has the address of the client."
    )
    client_connections: int = setting(
        4000, number(10, 1000000, int),
        "Connections of one client address at a time, about ten for each person who opens a notebook; for IPv6, one "
        "/64 network. trusted_proxies are not counted.",
    )
    connections: int | None = setting(
        "auto", auto_or(number(100, 1000000, int)),
        "Most connections of browsers at a time; auto: derived from LimitNOFILE= of the service."
    )


@dataclass(frozen=True)
class TlsSettings:
    """`[tls]`: certificates. Without any, the gateway serves plain HTTP."""

    certificates: tuple[str, ...] = setting(
        [], _paths, "Directories with fullchain.pem and privkey.pem, or files that hold both."
    )
    hsts: float | None = setting(
        "365d", word_or("none", positive_duration),
        "Time for which browsers must use HTTPS only (Strict-Transport-Security)."
    )
    acme: Listen | None = setting(  # noqa: RUF009  setting() returns a field
        "none", word_or("none", _listen), "Address of your ACME client, which serves /.well-known/acme-challenge/."
    )


@dataclass(frozen=True)
class FleetSettings:
    """`[fleet]`: discovery of hosts by DNS, and how claims are sent to hosts. [hosts.LABEL] lists hosts without DNS."""

    srv: str | None = setting(
        "none", word_or("none", _SRV), "DNS name whose SRV records are the hosts; [hosts] must be empty then."
    )
    srv_hosts: int = setting(64, number(1, 4000, int), "Most hosts that are used from SRV records.")
    resolvers: tuple[Listen, ...] | None = setting(
        "auto", auto_or(_listens), "DNS servers with ports; auto: those in /etc/resolv.conf."
    )
    domain: str | None = setting(
        "none", word_or("none", dns_domain), "The hosts' router.domain, if their router.url_mode is \"subdomain\"."
    )
    retries: int = setting(
        20, number(1, 100, int),
        "Number of further hosts that a claim is sent to, one after the other, if a host refuses it."
    )
    claim_timeout: float = setting(
        "75s", positive_duration,
        "Longest time that a host may take for a claim; it must be above pool.claim_timeout of the hosts."
    )


@dataclass(frozen=True)
class GatewayDnsSettings:
    """`[dns]`: removal of the records of dead hosts by nbagent-gateway-dns.service, if hosts publish their records."""

    server: DnsServer | None = setting(  # noqa: RUF009  setting() returns a field
        "none", word_or("none", dns_server),
        "DNS server that accepts updates of the zone (RFC 2136), with a port if it is not 53. Its TSIG key is in "
        "/etc/nbagent/dns-key.",
    )
    zone: str | None = setting("none", word_or("none", dns_domain), "Zone of the names of fleet.srv.")
    dead_after: float = setting(
        "5min", positive_duration, "Time without a response after which the records of a host are removed."
    )


@dataclass(frozen=True)
class LogSettings:
    """`[log]`: requests in the journal. Claims are always logged; query strings, which may have tokens, never are."""

    requests: str = setting(
        "trouble", matching("trouble|all", '"trouble" or "all"'),
        'Other requests that are logged: "trouble": failed ones; "all": all.'
    )


@dataclass(frozen=True)
class FleetHostSettings:
    """`[hosts.LABEL]`: a host, by the label in its slots' ids, which is host.label in its nbagent.toml."""

    address: str = setting("192.0.2.1", _address, "IP address of the host.")
    port: int = setting(8000, _PORT, "Port of the host's router.")
    check_port: int = setting(9001, _PORT, "Port of the host's agent check, which reports its free capacity.")
    weight: int = setting(
        100, number(1, 256, int),
        "Size of the host relative to others; its share of claims is proportional to this and to its free part."
    )
    drain: bool = setting(False, flag, "Whether claims are no longer sent to the host; its users stay.")


@dataclass(frozen=True)
class GatewaySettings:
    """All settings of a gateway."""

    listen: ListenSettings = field(default_factory=ListenSettings)
    tls: TlsSettings = field(default_factory=TlsSettings)
    fleet: FleetSettings = field(default_factory=FleetSettings)
    landing: LandingSettings = field(default_factory=LandingSettings)
    dns: GatewayDnsSettings = field(default_factory=GatewayDnsSettings)
    log: LogSettings = field(default_factory=LogSettings)
    hosts: Mapping[str, FleetHostSettings] = tables(FleetHostSettings, LABEL, LABEL_EXPECTED, "hosts")


def ring_number(label: str) -> int:
    """The host's place on the ring of a consistent hash, by its label only, so that all gateways use the same one."""
    return zlib.crc32(label.encode()) & 0x7FFF_FFFF or 1


def has_address(document: Mapping[str, object], label: str) -> bool:
    """Whether a parsed TOML document has the address of the host `label`, and not only changes to it."""
    hosts = document.get("hosts")
    host = hosts.get(label) if isinstance(hosts, Mapping) else None
    return isinstance(host, Mapping) and "address" in host


def settings_files(path: Path = DEFAULT_PATH) -> list[Path]:
    """The existing files of the configuration, in the order in which they are read."""
    extra = sorted(path.with_suffix(".d").glob("*.toml"))
    return [file for file in [path, *extra] if file.is_file()]


def load(path: Path = DEFAULT_PATH) -> GatewaySettings:
    """Read the configuration. Raises ConfigError, which names the file, the key and the expected value."""
    return parse(*read_tables(settings_files(path)))


def parse(document: Mapping[str, object], origin: Origin | None = None) -> GatewaySettings:
    """The settings in a parsed TOML document. `origin` has the file of each key. Raises ConfigError."""
    document, origin = rename_section(document, origin or {}, "door", "landing")
    reader = Reader(origin)
    settings = reader.section(GatewaySettings, document, ())
    for label in settings.hosts:
        if not has_address(document, label):
            raise reader.error(("hosts", label), "an `address`")
    numbers = {ring_number(label): label for label in settings.hosts}
    for label in settings.hosts:
        if (other := numbers[ring_number(label)]) != label:
            raise reader.error(("hosts", label), f"another label, because {label} and {other} have the same CRC-32")
    if settings.dns.server is not None:
        _check_dns(settings, reader)
    if settings.fleet.srv and settings.hosts:
        raise reader.error(("hosts",), "no hosts, because fleet.srv is set and finds them by DNS")
    if not settings.listen.http and not (settings.listen.https and settings.tls.certificates):
        raise reader.error(("listen", "http"), "an address, because there is none for HTTPS")
    return settings


def _check_dns(settings: GatewaySettings, reader: Reader) -> None:
    srv, zone = settings.fleet.srv, settings.dns.zone
    if srv is None or not srv.startswith("_nbagent._tcp."):
        raise reader.error(("fleet", "srv"), "_nbagent._tcp.DOMAIN, where hosts publish, because dns.server is set")
    if zone is None or not srv.endswith(f".{zone}"):
        raise reader.error(("dns", "zone"), f"the zone of {srv}, because dns.server is set")
