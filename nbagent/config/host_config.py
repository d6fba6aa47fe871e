# SPDX-License-Identifier: BSD-3-Clause
"""The settings of a host: names, defaults, descriptions, and checks that involve more than one setting.

They are read from `/etc/nbagent/nbagent.toml`, then from every `/etc/nbagent/conf.d/*.toml` in the order of their
names, by nbagent.config.schema. Every setting has a default that works on a single host. A description is printed in
nbagent.toml and nbagent.toml(5), which nbagent.config.reference generates.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from nbagent.config import host_values as values
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
from nbagent.core.model import IMAGE_NAME, IMAGE_NAME_EXPECTED
from nbagent.core.proxies import HttpProxy
from nbagent.core.quantities import parse_rate, parse_size

DEFAULT_PATH = paths.HOST_SETTINGS



def derived_label(hostname: str) -> str:
    """The default host label: the characters `[a-z0-9]` of the hostname's first part, at most 16."""
    return re.sub(r"[^a-z0-9]", "", hostname.split(".")[0].lower())[:16] or "host"


_LABEL = matching(r"[a-z0-9]{1,16}", "1 to 16 characters of a-z and 0-9")
_IMAGE_NAME = matching(IMAGE_NAME.pattern, IMAGE_NAME_EXPECTED)


@dataclass(frozen=True)
class HostSettings:
    """`[host]`: this host's identity in the fleet, and its memory reserve."""

    label: str | None = setting(
        "auto", auto_or(_LABEL),
        "First part of the ids of this host's slots, unique in the fleet; auto: derived from the hostname.",
    )
    memory_reserve: int = setting("512M", parse_size, "Available memory of the host that a start must leave.")


@dataclass(frozen=True)
class ApiSettings:
    """`[api]`: access to the control API, and its processes."""

    trusted_networks: tuple[Network, ...] = setting(
        ["127.0.0.0/8", "::1/128"], networks, "Networks whose clients need no token."
    )
    allowed_origins: tuple[str, ...] = setting(
        [], values.origins, 'Web origins whose pages may call the API; "*": any.'
    )
    workers: int = setting(2, number(1, 64, int), "Number of gunicorn worker processes.")
    threads: int = setting(
        64, number(1, 256, int), "Threads of each worker for calls, and as many again for the landing page."
    )


@dataclass(frozen=True)
class RouterSettings:
    """`[router]`: the addresses of slots for browsers."""

    url_mode: str = setting(
        "path", matching("path|subdomain", '"path" or "subdomain"'),
        '"path": all slots share one web origin; "subdomain": each slot has an origin of its own, SLOT.domain.',
    )
    domain: str | None = setting(
        "none", word_or("none", dns_domain),
        'For url_mode = "subdomain": DNS domain whose names *.domain resolve to the router.'
    )
    cookies: tuple[str, ...] = setting(
        ["_xsrf"], values.cookies,
        'Cookies that the router forwards to slots besides their login cookie, by name or "name*"; it removes all '
        'others.',
    )
    public_url: str | None = setting(
        "auto",
        auto_or(matching(r"https?://[^/\s]+", 'a URL without a path, such as "https://nb.example.org"')),
        "Scheme, host and port of the url in a claim; auto: the Host of the API request, or SLOT.domain, with `port`.",
    )
    port: int = setting(8000, number(1, 65535, int), "Port of the router in the url of a claim.")
    assets_url: str | None = setting(
        "none",
        word_or("none", matching(r"https?://[^/\s\"'<>]+(/[A-Za-z0-9._~/-]*[A-Za-z0-9._~-])?",
                                 'a URL without a slash at its end, such as "https://cdn.example.net/notebooks"')),
        "Address of a CDN, below which /assets/ leads to the router's or the gateway's /assets/, or of the target of "
        "`nbagent image assets publish`; slots that start from then on load JupyterLab from there, and from the "
        "router if that fails. none: from the router."
    )
    trusted_proxies: tuple[Network, ...] = setting(
        [], networks, "Gateways and proxies whose X-Forwarded-For header has the address of the client."
    )
    client_connections: int = setting(
        2000, number(10, 1000000, int),
        "Requests and websockets of one client address at a time, about three for each open notebook; for IPv6, one "
        "/64 network.",
    )


@dataclass(frozen=True)
class LandingSettings:
    """`[landing]`: the pages on which people start a notebook, and tmpnb's public API, both served by the router."""

    access: str = setting(
        "public", matching("public|token|off", '"public", "token" or "off"'),
        'Clients that may start a slot: "public": all; "token": those with the token in /etc/nbagent/landing-token; '
        '"off": none.',
    )
    start: str = setting(
        "click", matching("click|at once", '"click" or "at once"'),
        "When the front page starts a slot: after a click on its button, or when it is opened."
    )
    title: str = setting("A notebook, at once", values.sentence(1, 80), "Title of the front page.")
    text: str = setting(
        "A live Jupyter notebook in your browser, with nothing to install. It is yours when you press the button.",
        values.sentence(0, 600), "Text below the title.",
    )
    rate: int = setting(
        60, number(1, 100000, int), "Slots that one client address may start in a minute; for IPv6, one /64 network."
    )
    prerender: bool = setting(
        True, flag,
        "Whether a visitor's browser loads the notebook before the click, in a slot that is lent to it for a minute. A "
        "host that is half full lends none.",
    )
    banned: tuple[Network, ...] = setting([], networks, "Networks whose requests are refused.")
    allowed_origins: tuple[str, ...] = setting(
        [], values.origins, 'Web origins whose pages may start slots by the API; "*": any.'
    )


@dataclass(frozen=True)
class SlotSettings:
    """`[slots]`: limits of a slot's resources and of its life."""

    capacity: int | None = setting(
        "auto", auto_or(number(1, 60000, int)),
        "Most slots at a time; auto: by `overcommit`."
    )
    overcommit: float | None = setting(
        "auto", auto_or(number(0.1, 100, float)),
        "Memory of all slots together, as a multiple of the host's; auto: as many slots as fit by what they use.",
    )
    memory: int = setting("1G", parse_size, "MemoryMax= of a slot whose claim has no other value.")
    memory_max: int = setting("4G", parse_size, "Highest `memory` that a claim may request.")
    storage: int | None = setting(
        "auto", auto_or(parse_size),
        "Size of a slot's writable file system, which is in its memory; auto: half of `memory`."
    )
    cpu_weight: int = setting(100, number(1, 10000, int), "CPUWeight= of a slot.")
    cpu_weight_busy: float = setting(
        0.05, number(0.0001, 1, float),
        "Part of its CPU weight that a slot keeps while it computes for more than about a second and no processor of "
        "the host is free, so that cells of others run at once; 1: all of it.",
    )
    cpu_quota: str = setting(
        "none", values.quota, 'CPUQuota= of a slot: "1/32" of the host, "50%" of one processor, or "none".'
    )
    tasks: int = setting(
        256, number(16, 65536, int),
        "TasksMax= of a slot: processes and threads. A library starts a sixteenth of it as threads, at most.",
    )
    ttl: float = setting("12h", positive_duration, "Life of a claimed slot whose claim has no other value.")
    ttl_max: float = setting("24h", positive_duration, "Highest `ttl` that a claim may request.")
    start_timeout: float = setting(
        "60s", positive_duration, "Time from the start of a slot after which it has failed if it is not ready."
    )
    stop_timeout: float = setting("3s", positive_duration, "Time between SIGTERM and SIGKILL when a slot ends.")

    @property
    def storage_bytes(self) -> int:
        """The size of a slot's writable file system."""
        return self.memory // 2 if self.storage is None else self.storage


@dataclass(frozen=True)
class PoolSettings:
    """`[pool]`: warm slots, which are started before they are claimed."""

    image: str = setting("minimal", _IMAGE_NAME, "Image of a claim that does not name one.")
    warm: int = setting(2, number(0, 10000, int), "Number of warm slots of each image.")
    starts: int | None = setting(
        "auto", auto_or(number(1, 1000, int)),
        "Most starts at a time, where four starts by fork count as one; auto: one for each processor.",
    )
    max_age: float = setting("6h", positive_duration, "Age at which a warm slot is replaced.")
    backoff: float = setting(
        "1s", positive_duration, "Pause after a failed start; it doubles with each further failure."
    )
    backoff_max: float = setting("60s", positive_duration, "Longest pause.")
    claim_timeout: float = setting("30s", positive_duration, "Longest time that a claim waits for a slot.")
    zygote_slots: int = setting(
        1000, number(1, 1_000_000, int), "Number of forked slots after which a zygote is replaced."
    )
    zygote_age: float = setting("1h", positive_duration, "Age at which a zygote is replaced.")
    zygote_memory: int = setting(
        "1G", parse_size,
        "MemoryMax= of a zygote, whose memory the slots that it forks share; its TasksMax= is slots.tasks.",
    )


@dataclass(frozen=True)
class ClaimSettings:
    """`[claims]`: limits of the content that is delivered to a claimed slot."""

    archives: tuple[str, ...] = setting(
        [], values.archives, "URL prefixes of archives that a slot with a network may download."
    )
    archive_max: int = setting("128M", parse_size, "Largest size of an archive, both compressed and unpacked.")
    archive_entries: int = setting(10000, number(1, 1000000, int), "Most files and directories in an archive.")
    timeout: float = setting(
        "20s", positive_duration, "Time after which the claim fails if its content was not delivered."
    )


@dataclass(frozen=True)
class CullSettings:
    """`[cull]`: the rules that compress idle slots and end claimed ones."""

    idle: float = setting(
        "1h", positive_duration,
        "Time without a busy kernel or a user's action after which a claimed slot is ended. A kernel that waits for "
        "input or at a breakpoint is not busy.",
    )
    cpu: float = setting(0.05, number(0, 64, float), "Processors in use below which a slot counts as idle.")
    interval: float = setting("30s", positive_duration, "Time between two evaluations of the rules.")
    compress: float | None = setting(
        "10min", word_or("never", positive_duration),
        'Idle time after which a slot\'s memory is compressed if all swap of the host is in zram; or "never".',
    )


@dataclass(frozen=True)
class NetworkSettings:
    """`[network]`: networks that slots may reach: never the host, and private networks only with `also`."""

    allow: tuple[str, ...] = setting(
        ["none"], values.network_modes,
        'Values of `network` that a claim may request, the default first: "none", "internet".',
    )
    only: tuple[str | Network, ...] = setting(
        [], values.reach,
        "If not empty, slots reach only these networks and DNS domains with their subdomains; other names do not "
        "resolve."
    )
    also: tuple[Network, ...] = setting([], networks, "Private networks that slots may reach.")
    proxy: HttpProxy | None = setting(  # noqa: RUF009  setting() returns a field
        "none", word_or("none", values.http_proxy),
        "IP address and port of an HTTP proxy, for a host that has no other way out. Slots that start from then on get "
        "http_proxy, https_proxy and no_proxy if they have a network, and archives and images are downloaded by it. "
        "The proxy has to refuse private networks, because the host does not see what it connects to.",
    )
    up: int = setting("100Mbit", parse_rate, "Bits a second that one slot may send.")
    down: int = setting("100Mbit", parse_rate, "Bits a second that one slot may receive.")
    connections: int = setting(512, number(1, 60000, int), "Most connections of one slot at a time.")
    connection_rate: int = setting(50, number(1, 10000, int), "Most new connections of one slot in a second.")
    range4: IPv4Network = setting(  # noqa: RUF009  setting() returns a field
        "198.18.0.0/16", values.prefix_range(IPv4Network, 8, 24), "IPv4 network of the slots' addresses, behind NAT."
    )
    range6: IPv6Network = setting(  # noqa: RUF009  setting() returns a field
        "fd6e:6261:6765:6e74::/64", values.prefix_range(IPv6Network, 32, 112),
        "IPv6 network of the slots' addresses, used if the host forwards IPv6 and has a default route.",
    )


@dataclass(frozen=True)
class DnsSettings:
    """`[dns]`: the records of this host, which nbagent-dns-update.service publishes for gateways with fleet.srv."""

    server: DnsServer | None = setting(  # noqa: RUF009  setting() returns a field
        "none", word_or("none", dns_server),
        "DNS server that accepts updates of the zone (RFC 2136), with a port if it is not 53; the TSIG key is in "
        "/etc/nbagent/dns-key. Restart nbagent-dns-update.service after a change in [dns].",
    )
    zone: str | None = setting("none", word_or("none", dns_domain), "Zone that is updated.")
    domain: str | None = setting(
        "auto", auto_or(dns_domain),
        "Domain of the hosts, in the zone: SRV records at _nbagent._tcp.DOMAIN, addresses at LABEL.DOMAIN; auto: the "
        "zone.",
    )
    addresses: tuple[str, ...] | None = setting(
        "auto", auto_or(values.addresses),
        "Addresses of this host for gateways; auto: the one from which it reaches the DNS server.",
    )
    ttl: int = setting("10s", values.record_ttl, "Time for which resolvers may keep the records.")


@dataclass(frozen=True)
class ImageSettings:
    """`[images.NAME]`: settings of one image."""

    warm: int | None = setting("auto", auto_or(number(0, 10000, int)), "Number of warm slots; auto: as in [pool].")
    network: str | None = setting(
        "auto", auto_or(values.network_mode),
        "Network of a claim that does not name one; auto: the first of network.allow.",
    )


@dataclass(frozen=True)
class HostConfig:
    """All settings of a host."""

    host: HostSettings = field(default_factory=HostSettings)
    api: ApiSettings = field(default_factory=ApiSettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    landing: LandingSettings = field(default_factory=LandingSettings)
    slots: SlotSettings = field(default_factory=SlotSettings)
    pool: PoolSettings = field(default_factory=PoolSettings)
    claims: ClaimSettings = field(default_factory=ClaimSettings)
    cull: CullSettings = field(default_factory=CullSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    dns: DnsSettings = field(default_factory=DnsSettings)
    images: Mapping[str, ImageSettings] = tables(ImageSettings, IMAGE_NAME.pattern, IMAGE_NAME_EXPECTED, "image names")

    @property
    def label(self) -> str:
        """The host label, from host.label or from the hostname."""
        return self.host.label or derived_label(socket.gethostname())

    def warm(self, image: str) -> int:
        """The number of warm slots of `image`."""
        settings = self.images.get(image)
        return self.pool.warm if settings is None or settings.warm is None else settings.warm

    def network_mode(self, image: str) -> str:
        """The network of a claim of `image` that does not name one."""
        settings = self.images.get(image)
        return (settings.network if settings else None) or self.network.allow[0]


@dataclass
class CurrentConfig:
    """The configuration in force. A reload replaces `value`, so read it at each use."""

    value: HostConfig


def settings_files(path: Path = DEFAULT_PATH) -> list[Path]:
    """The existing files of the configuration, in the order in which they are read."""
    extra = sorted((path.parent / "conf.d").glob("*.toml"))
    return [file for file in [path, *extra] if file.is_file()]


def load(path: Path = DEFAULT_PATH) -> HostConfig:
    """Read the configuration. Raises ConfigError, which names the file, the key and the expected value."""
    return parse(*read_tables(settings_files(path)))


def parse(tables: Mapping[str, object], origin: Origin | None = None) -> HostConfig:
    """The HostConfig of parsed TOML tables. `origin` has the file of each key. Raises ConfigError."""
    tables, origin = rename_section(tables, origin or {}, "door", "landing")
    reader = Reader(origin)
    config = reader.section(HostConfig, tables, ())
    if config.slots.memory > config.slots.memory_max:
        raise reader.error(("slots", "memory"), f"at most slots.memory_max, {config.slots.memory_max}")
    if config.slots.storage_bytes > config.slots.memory:
        raise reader.error(("slots", "storage"), f"at most slots.memory, {config.slots.memory}")
    if config.slots.ttl > config.slots.ttl_max:
        raise reader.error(("slots", "ttl"), f"at most slots.ttl_max, {config.slots.ttl_max:g} seconds")
    _check_origins(config.router, reader)
    _check_dns(config.dns, reader)
    if config.network.proxy is not None and config.network.only:
        expected = "an empty list, because network.proxy connects slots to every name and address that it permits"
        raise reader.error(("network", "only"), expected)
    for name, image in config.images.items():
        if image.network not in (None, *config.network.allow):
            raise reader.error(("images", name, "network"), f"one of network.allow, {', '.join(config.network.allow)}")
    return config


def _check_origins(router: RouterSettings, reader: Reader) -> None:
    if router.url_mode == "path":
        if router.domain is not None:
            raise reader.error(("router", "domain"), '"none", unless router.url_mode is "subdomain"')
        return
    if router.domain is None:
        raise reader.error(("router", "domain"), 'a DNS name, because router.url_mode is "subdomain"')
    with_port = rf"https?://{re.escape(router.domain)}(:\d{{1,5}})?"
    if router.public_url and not re.fullmatch(with_port, router.public_url):
        raise reader.error(
            ("router", "public_url"), f'"auto" or router.domain with a scheme, as in "https://{router.domain}"'
        )


def _check_dns(dns: DnsSettings, reader: Reader) -> None:
    if dns.server is not None and dns.zone is None:
        raise reader.error(("dns", "zone"), "a DNS zone, because dns.server is set")
    if dns.domain and not f".{dns.domain}".endswith(f".{dns.zone}"):
        raise reader.error(("dns", "domain"), f"dns.zone, {dns.zone or 'none'}, or a name below it")
