"""Settings: what may be set, its default, how it is written, and how wrong input is explained.

Read from `/etc/nbagent/nbagent.toml`, then every `/etc/nbagent/conf.d/*.toml` in the order of
their names, as nbagent.config.schema reads them. Every setting has a default that works on one host.

Sample files is all this module does to the world; nothing here knows what a setting is for.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, TypeVar

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
from nbagent.core import urls
from nbagent.core.model import IMAGE_NAME, IMAGE_NAME_EXPECTED
from nbagent.core.quantities import QUOTA_EXPECTED, parse_quota, parse_rate, parse_size

DEFAULT_PATH = Path("/etc/nbagent/nbagent.toml")
# What a slot's network can be: nothing but loopback, or the public internet by way of the host.
NETWORK_MODES = ("none", "internet")

N = TypeVar("N", IPv4Network, IPv6Network)


def _quota(value: Any) -> str:
    if value == "none":
        return "none"
    try:
        parse_quota(value, 1 << 20)
    except ValueError:
        raise ValueError(f'"none" or {QUOTA_EXPECTED}') from None
    return str(value)


def _origins(value: Any) -> tuple[str, ...]:
    pattern = r"\*|https?://[^/\s]+"
    if isinstance(value, list) and all(isinstance(v, str) and re.fullmatch(pattern, v) for v in value):
        return tuple(value)
    raise ValueError('a list of origins such as ["https://example.org"], without a path')


def _cookies(value: Any) -> tuple[str, ...]:
    expected = 'a list of at most 16 names of cookies such as ["_xsrf", "session-*"]'
    parse = matching(r"[A-Za-z0-9_.-]{1,64}\*?", expected)
    if isinstance(value, list) and len(value) <= 16:
        return tuple(map(parse, value))
    raise ValueError(expected)


def _sentence(low: int, high: int) -> Callable[[Any], str]:
    return matching(rf"[^\x00-\x1f\x7f]{{{low},{high}}}", f"text of {low} to {high} characters in one line")


def _archives(value: Any) -> tuple[str, ...]:
    expected = 'a list of URLs such as ["https://data.example.org/courses/"], without "?", "#" or ".."'
    if not isinstance(value, list) or not all(isinstance(v, str) and "?" not in v for v in value):
        raise ValueError(expected)
    try:
        return tuple(value) if [urls.parse(item) for item in value] else ()
    except ValueError:
        raise ValueError(expected) from None


def _mode(value: Any) -> str:
    if value in NETWORK_MODES:
        return str(value)
    raise ValueError('"none" or "internet"')


def _modes(value: Any) -> tuple[str, ...]:
    known = isinstance(value, list) and all(mode in NETWORK_MODES for mode in value)
    if known and value and len(set(value)) == len(value):
        return tuple(value)
    raise ValueError('a list with "none", "internet" or both, the default first')


_DNS_NAME = re.compile(
    r"(?=.{1,253}$)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9])?\.)+[a-z](?:[a-z0-9-]{0,61}[a-z0-9])"
)


def _reach(value: Any) -> tuple[str | Network, ...]:
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


def _range(kind: type[N], shortest: int, longest: int) -> Callable[[Any], N]:
    def parse(value: Any) -> N:
        with contextlib.suppress(ValueError):
            network = ipaddress.ip_network(value) if isinstance(value, str) else None
            if isinstance(network, kind) and shortest <= network.prefixlen <= longest:
                return network
        raise ValueError(f"an {kind.__name__[:4]} network with a prefix of {shortest} to {longest} bits")

    return parse


def derived_label(hostname: str) -> str:
    """A host label from a hostname: its first part, `[a-z0-9]`, at most 16 characters."""
    return re.sub(r"[^a-z0-9]", "", hostname.split(".")[0].lower())[:16] or "host"


_LABEL = matching(r"[a-z0-9]{1,16}", "1 to 16 characters of a-z and 0-9")
_IMAGE_NAME = matching(IMAGE_NAME.pattern, IMAGE_NAME_EXPECTED)


@dataclass(frozen=True)
class HostSettings:
    """`[host]`: this machine in the fleet."""

    label: str | None = setting("auto", auto_or(_LABEL), "Unique in the fleet; auto: from the hostname.")
    memory_reserve: int = setting("512M", parse_size, "No slot is started when less than this would be left.")


@dataclass(frozen=True)
class ApiSettings:
    """`[api]`: who may call the control API, and how it is served."""

    trusted_networks: tuple[Network, ...] = setting(
        ["127.0.0.0/8", "::1/128"], networks, "Peers that need no token."
    )
    allowed_origins: tuple[str, ...] = setting([], _origins, 'Web origins whose pages may call; "*": any.')
    workers: int = setting(2, number(1, 64, int), "gunicorn worker processes.")
    threads: int = setting(64, number(1, 256, int), "Threads of each worker: calls that wait at a time.")


@dataclass(frozen=True)
class RouterSettings:
    """`[router]`: where users reach their slots."""

    url_mode: str = setting(
        "path", matching("path|subdomain", '"path" or "subdomain"'),
        'Slots share one web origin with "path"; with "subdomain" each has its own, SLOT.domain.',
    )
    domain: str | None = setting(
        "none", word_or("none", dns_domain), 'With url_mode = "subdomain": *.domain leads to the router.'
    )
    cookies: tuple[str, ...] = setting(
        ["_xsrf"], _cookies,
        'Cookies that reach a slot beside its own login, by name or "name*"; all others are kept from it.',
    )
    public_url: str | None = setting(
        "auto",
        auto_or(matching(r"https?://[^/\s]+", 'a URL without a path, such as "https://nb.example.org"')),
        "The front of a claim's url; auto: the name the API was called by, or SLOT.domain, on `port`.",
    )
    port: int = setting(8000, number(1, 65535, int), "The router's port in a claim's url.")
    trusted_proxies: tuple[Network, ...] = setting(
        [], networks, "Gateways and proxies in front, whose X-Forwarded-For says who the client is."
    )


@dataclass(frozen=True)
class LandingSettings:
    """`[landing]`: the pages where people start a notebook, and tmpnb's public API; served by the router."""

    access: str = setting(
        "public", matching("public|token|off", '"public", "token" or "off"'),
        'Who may start a slot: anybody; programs with the token of /etc/nbagent/landing-token; "off": there is none.',
    )
    start: str = setting(
        "click", matching("click|at once", '"click" or "at once"'), "Whether the front page waits for its button."
    )
    title: str = setting("A notebook, at once", _sentence(1, 80), "What the front page says first.")
    text: str = setting(
        "A live Jupyter notebook in your browser, with nothing to install. It is yours when you press the button.",
        _sentence(0, 600), "And what below.",
    )
    rate: int = setting(60, number(1, 100000, int), "Slots that one address may start a minute, IPv6 by /64.")
    banned: tuple[Network, ...] = setting([], networks, "Addresses that are served nothing.")
    allowed_origins: tuple[str, ...] = setting(
        [], _origins, 'Web origins whose pages may start slots by the API; "*": any.'
    )


@dataclass(frozen=True)
class SlotSettings:
    """`[slots]`: what one slot may use, and for how long."""

    capacity: int | None = setting(
        "auto", auto_or(number(1, 60000, int)), "Slots at a time; auto: from memory and overcommit."
    )
    overcommit: float = setting(4.0, number(0.1, 100, float), "How often the host's memory may be promised.")
    memory: int = setting("1G", parse_size, "MemoryMax= of a slot, unless the claim asks otherwise.")
    memory_max: int = setting("4G", parse_size, "The most that a claim may ask for.")
    storage: int | None = setting(
        "auto", auto_or(parse_size), "Files a slot may write, which are in its memory; auto: half of `memory`."
    )
    cpu_weight: int = setting(100, number(1, 10000, int), "CPUWeight= of a slot.")
    cpu_quota: str = setting("none", _quota, 'CPUQuota= of a slot: "1/32" of the host, "50%" of one, "none".')
    tasks: int = setting(256, number(16, 65536, int), "TasksMax= of a slot: processes and threads.")
    ttl: float = setting("12h", positive_duration, "How long a claimed slot lives, unless asked otherwise.")
    ttl_max: float = setting("24h", positive_duration, "The longest life that a claim may ask for.")
    start_timeout: float = setting("60s", positive_duration, "A slot not ready by then has failed.")
    stop_timeout: float = setting("3s", positive_duration, "From SIGTERM to SIGKILL.")

    @property
    def storage_bytes(self) -> int:
        """The size of a slot's file system."""
        return self.memory // 2 if self.storage is None else self.storage


@dataclass(frozen=True)
class PoolSettings:
    """`[pool]`: warm slots, ready before anyone asks."""

    image: str = setting("minimal", _IMAGE_NAME, "The image of a claim that names none.")
    warm: int = setting(2, number(0, 10000, int), "Warm slots of each image.")
    starts: int | None = setting(
        "auto", auto_or(number(1, 1000, int)),
        "Starts at a time, of which four by fork count as one; auto: one a processor.",
    )
    max_age: float = setting("6h", positive_duration, "A warm slot older than this is replaced.")
    backoff: float = setting("1s", positive_duration, "Pause after a failed start; doubles with each.")
    backoff_max: float = setting("60s", positive_duration, "The longest pause.")
    claim_timeout: float = setting("30s", positive_duration, "How long a claim waits for a start.")
    zygote_slots: int = setting(1000, number(1, 1_000_000, int), "A zygote is replaced after so many slots.")
    zygote_age: float = setting("1h", positive_duration, "A zygote older than this is replaced.")


@dataclass(frozen=True)
class ClaimSettings:
    """`[claims]`: what a claim may bring into its slot."""

    archives: tuple[str, ...] = setting([], _archives, "A slot with a network may fetch archives below these URLs.")
    archive_max: int = setting("128M", parse_size, "Bytes of an archive, packed and unpacked.")
    archive_entries: int = setting(10000, number(1, 1000000, int), "Files and directories of an archive.")
    timeout: float = setting("20s", positive_duration, "Content not in the slot by then: the claim has failed.")


@dataclass(frozen=True)
class CullSettings:
    """`[cull]`: when a slot that nobody uses is compressed, and when one that somebody claimed is ended."""

    idle: float = setting("1h", positive_duration, "No kernel busy and nobody acting for this long.")
    cpu: float = setting(0.05, number(0, 64, float), "Processors' worth of use below which a slot is idle.")
    interval: float = setting("30s", positive_duration, "How often the rules are looked at.")
    compress: float | None = setting(
        "10min", word_or("never", positive_duration),
        'At rest for this long, a slot\'s memory is compressed, where all swap of the host is zram; or "never".',
    )


@dataclass(frozen=True)
class NetworkSettings:
    """`[network]`: what slots may reach beyond themselves. The host and private networks are refused always."""

    allow: tuple[str, ...] = setting(
        ["none"], _modes, 'Networks that a claim may ask for, the default first: "none", "internet".'
    )
    only: tuple[str | Network, ...] = setting(
        [], _reach, "When not empty: names, with all below them, and ranges that alone are reached; no others resolve."
    )
    also: tuple[Network, ...] = setting([], networks, "Private ranges that are reached although they are private.")
    up: int = setting("100Mbit", parse_rate, "What one slot may send, in bits a second.")
    down: int = setting("100Mbit", parse_rate, "What one slot may receive, in bits a second.")
    connections: int = setting(512, number(1, 60000, int), "Connections of one slot at a time.")
    connection_rate: int = setting(50, number(1, 10000, int), "New connections of one slot a second.")
    range4: IPv4Network = setting(  # noqa: RUF009  a field, whatever its type
        "198.18.0.0/16", _range(IPv4Network, 8, 24), "Where slots have their addresses, behind NAT."
    )
    range6: IPv6Network = setting(  # noqa: RUF009  a field, whatever its type
        "fd6e:6261:6765:6e74::/64", _range(IPv6Network, 32, 112),
        "Likewise; used where the host forwards IPv6 and has a route.",
    )


@dataclass(frozen=True)
class ImageSettings:
    """`[images.NAME]`: what differs for one image."""

    warm: int | None = setting("auto", auto_or(number(0, 10000, int)), "Warm slots; auto: as in [pool].")
    network: str | None = setting(
        "auto", auto_or(_mode), "The network of a claim that names none; auto: the first of network.allow."
    )


@dataclass(frozen=True)
class HostConfig:
    """All settings, each with its default."""

    host: HostSettings = field(default_factory=HostSettings)
    api: ApiSettings = field(default_factory=ApiSettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    landing: LandingSettings = field(default_factory=LandingSettings)
    slots: SlotSettings = field(default_factory=SlotSettings)
    pool: PoolSettings = field(default_factory=PoolSettings)
    claims: ClaimSettings = field(default_factory=ClaimSettings)
    cull: CullSettings = field(default_factory=CullSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    images: Mapping[str, ImageSettings] = tables(ImageSettings, IMAGE_NAME.pattern, IMAGE_NAME_EXPECTED, "image names")

    @property
    def label(self) -> str:
        """The host label, from the setting or the hostname."""
        return self.host.label or derived_label(socket.gethostname())

    def warm(self, image: str) -> int:
        """How many warm slots the pool of `image` wants."""
        settings = self.images.get(image)
        return self.pool.warm if settings is None or settings.warm is None else settings.warm

    def network_mode(self, image: str) -> str:
        """The network of a claim of `image` that names none."""
        settings = self.images.get(image)
        return (settings.network if settings else None) or self.network.allow[0]


@dataclass
class CurrentConfig:
    """The configuration in force. A reload replaces `value`, and every holder reads it here at each use."""

    value: HostConfig


def settings_files(path: Path = DEFAULT_PATH) -> list[Path]:
    """The files that make the configuration, in the order they are read; missing ones left out."""
    extra = sorted((path.parent / "conf.d").glob("*.toml"))
    return [file for file in [path, *extra] if file.is_file()]


def load(path: Path = DEFAULT_PATH) -> HostConfig:
    """Reads the configuration. Raises ConfigError naming file, key and what would be right."""
    return parse(*read_tables(settings_files(path)))


def parse(tables: Mapping[str, Any], origin: Mapping[tuple[str, ...], Path] | None = None) -> HostConfig:
    """A HostConfig of tables as TOML gives them. `origin` says which file each key came from."""
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
        raise reader.error(("router", "domain"), 'a DNS name, since router.url_mode is "subdomain"')
    with_port = rf"https?://{re.escape(router.domain)}(:\d{{1,5}})?"
    if router.public_url and not re.fullmatch(with_port, router.public_url):
        raise reader.error(
            ("router", "public_url"), f'"auto" or router.domain with a scheme, as in "https://{router.domain}"'
        )
