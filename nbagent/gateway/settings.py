"""Settings of a gateway: `/etc/nbagent/gateway.toml`, then `/etc/nbagent/gateway.d/*.toml` by name.

They are read, judged and explained as nbagent.toml is (nbagent.config). The hosts of the fleet are
among them, each a table `[hosts.LABEL]`; so a file for each host in gateway.d is one way to keep
them, and that of `nbagent gateway add-host`.
"""

from __future__ import annotations

import ipaddress
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbagent.config.host_config import LandingSettings
from nbagent.config.schema import (
    Network,
    Reader,
    auto_or,
    dns_domain,
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

DEFAULT_PATH = Path("/etc/nbagent/gateway.toml")
LABEL = r"[a-z0-9]{1,16}"
LABEL_EXPECTED = "1 to 16 characters of a-z and 0-9, the label of a host"
_LISTEN = re.compile(r"(\*|\d+\.\d+\.\d+\.\d+|\[[0-9a-f:]+\]):(\d{1,5})")


@dataclass(frozen=True)
class Listen:
    """An address with a port: every IPv4 address is "*", every IPv6 one "::"."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def _listen(value: Any) -> Listen:
    match = _LISTEN.fullmatch(value) if isinstance(value, str) else None
    try:
        if match and 1 <= int(match[2]) <= 65535:
            address = match[1].strip("[]")
            return Listen(address if address == "*" else str(ipaddress.ip_address(address)), int(match[2]))
    except ValueError:
        pass
    raise ValueError('an address with a port, such as "*:80", "[::]:80" or "127.0.0.1:8080"')


def _listens(value: Any) -> tuple[Listen, ...]:
    expected = 'a list of addresses with ports, such as ["*:80", "[::]:80"]'
    if not isinstance(value, list):
        raise ValueError(expected)
    try:
        return tuple(map(_listen, value))
    except ValueError:
        raise ValueError(expected) from None


def _address(value: Any) -> str:
    try:
        if isinstance(value, str):
            return str(ipaddress.ip_address(value))
    except ValueError:
        pass
    raise ValueError('an IP address such as "10.1.0.7"; names are found with fleet.srv')


def _paths(value: Any) -> tuple[str, ...]:
    expected = 'a list of files or directories such as ["/etc/letsencrypt/live/nb.example.org"]'
    if isinstance(value, list) and all(isinstance(v, str) and re.fullmatch(r"/[^\s\"'\\]+", v) for v in value):
        return tuple(value)
    raise ValueError(expected)


_PORT = number(1, 65535, int)
_SRV = matching(r"(_?[a-z0-9-]+\.){2,}[a-z0-9-]+", 'a name with SRV records such as "_nbagent._tcp.hosts.example.org"')


@dataclass(frozen=True)
class ListenSettings:
    """`[listen]`: where browsers come in, and who may speak for them."""

    http: tuple[Listen, ...] = setting(
        ["*:80", "[::]:80"], _listens, "Plain HTTP; with tls.certificates only a redirect to https."
    )
    https: tuple[Listen, ...] = setting(["*:443", "[::]:443"], _listens, "HTTPS, when there are tls.certificates.")
    metrics: Listen | None = setting(  # noqa: RUF009  a field, whatever its type
        "127.0.0.1:8405", word_or("none", _listen),
        "HAProxy's own figures: /metrics for Prometheus, /stats for people. It asks for no password.",
    )
    trusted_proxies: tuple[Network, ...] = setting(
        [], networks, "Proxies in front, whose X-Forwarded-For says who the client is."
    )
    connections: int | None = setting(
        "auto", auto_or(number(100, 1000000, int)), "Of browsers, at a time; auto: by LimitNOFILE= of the service."
    )


@dataclass(frozen=True)
class TlsSettings:
    """`[tls]`: certificates. Without any, the gateway speaks plain HTTP."""

    certificates: tuple[str, ...] = setting(
        [], _paths, "Directories with fullchain.pem and privkey.pem, or files that hold both."
    )
    hsts: float | None = setting(
        "365d", word_or("none", positive_duration), "How long browsers shall come by https only."
    )
    acme: Listen | None = setting(  # noqa: RUF009  a field, whatever its type
        "none", word_or("none", _listen), "Where your ACME client answers /.well-known/acme-challenge/."
    )


@dataclass(frozen=True)
class FleetSettings:
    """`[fleet]`: how hosts are found and asked. Those that DNS does not list are [hosts.LABEL]."""

    srv: str | None = setting(
        "none", word_or("none", _SRV), "A name whose SRV records are the hosts; [hosts] is empty then."
    )
    srv_hosts: int = setting(64, number(1, 4000, int), "The most hosts that SRV records may name.")
    resolvers: tuple[Listen, ...] | None = setting(
        "auto", auto_or(_listens), "DNS servers with ports; auto: those of /etc/resolv.conf."
    )
    domain: str | None = setting(
        "none", word_or("none", dns_domain), "The hosts' router.domain, when each slot has a name of its own in it."
    )
    retries: int = setting(
        20, number(1, 100, int), "Hosts that are asked one after the other for a slot, beyond the first."
    )
    claim_timeout: float = setting(
        "75s", positive_duration, "The longest that a claim may take: pool.claim_timeout of the hosts, and some more."
    )


@dataclass(frozen=True)
class LogSettings:
    """`[log]`: what the journal is told. Claims are there always; queries, and tokens with them, never."""

    requests: str = setting("trouble", matching("trouble|all", '"trouble" or "all"'), "Of all other requests.")


@dataclass(frozen=True)
class FleetHostSettings:
    """`[hosts.LABEL]`: a host, by the label in its slots' ids (host.label of its nbagent.toml)."""

    address: str = setting("192.0.2.1", _address, "Its IP address.")
    port: int = setting(8000, _PORT, "The port of its router.")
    check_port: int = setting(9001, _PORT, "The port that tells its free capacity.")
    weight: int = setting(
        100, number(1, 256, int), "Its size beside the others': claims come by this times the part of it that is free."
    )
    drain: bool = setting(False, lambda value: _flag(value), "It is asked for no more slots; users stay.")


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError("true or false")


@dataclass(frozen=True)
class GatewaySettings:
    """All settings of a gateway."""

    listen: ListenSettings = field(default_factory=ListenSettings)
    tls: TlsSettings = field(default_factory=TlsSettings)
    fleet: FleetSettings = field(default_factory=FleetSettings)
    landing: LandingSettings = field(default_factory=LandingSettings)
    log: LogSettings = field(default_factory=LogSettings)
    hosts: Mapping[str, FleetHostSettings] = tables(FleetHostSettings, LABEL, LABEL_EXPECTED, "hosts")


def ring_number(label: str) -> int:
    """The host's place on the ring of a consistent hash: of its label alone, so that all gateways agree."""
    return zlib.crc32(label.encode()) & 0x7FFF_FFFF or 1


def settings_files(path: Path = DEFAULT_PATH) -> list[Path]:
    """The files that make the configuration, in the order they are read; missing ones left out."""
    extra = sorted(path.with_suffix(".d").glob("*.toml"))
    return [file for file in [path, *extra] if file.is_file()]


def load(path: Path = DEFAULT_PATH) -> GatewaySettings:
    """Reads the configuration. Raises ConfigError naming file, key and what would be right."""
    return parse(*read_tables(settings_files(path)))


def parse(document: Mapping[str, Any], origin: Mapping[tuple[str, ...], Path] | None = None) -> GatewaySettings:
    """The settings in a document as TOML gives them. `origin` says which file each key came from."""
    document, origin = rename_section(document, origin or {}, "door", "landing")
    reader = Reader(origin)
    settings = reader.section(GatewaySettings, document, ())
    for label in settings.hosts:
        if "address" not in document["hosts"][label]:
            raise reader.error(("hosts", label), "an `address`")
    numbers = {ring_number(label): label for label in settings.hosts}
    for label in settings.hosts:
        if (other := numbers[ring_number(label)]) != label:
            raise reader.error(("hosts", label), f"another label, as it and {other} have the same CRC")
    if settings.fleet.srv and settings.hosts:
        raise reader.error(("hosts",), "no hosts beside fleet.srv, which finds them")
    if not settings.listen.http and not (settings.listen.https and settings.tls.certificates):
        raise reader.error(("listen", "http"), "an address, as there is no https")
    return settings
