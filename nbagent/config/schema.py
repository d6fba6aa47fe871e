# SPDX-License-Identifier: BSD-3-Clause
"""Settings as dataclasses: their declaration, and a strict reader of TOML files.

A field carries its parser, its default and its description, so that nbagent.config.reference generates the
configuration files and manual pages from the same declarations. A later file overrides an earlier one key by key.
An unknown key or a wrong value is an error that names the file, the key and the expected value, because a misspelt
limit must not be ignored silently.

nbagent.config.host_config has the settings of a host, nbagent.gateway.settings those of a gateway.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import logging
import os
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nbagent.core.errors import ConfigError
from nbagent.core.quantities import parse_duration

Network = IPv4Network | IPv6Network
# File of each key, for error messages.
Origin = Mapping[tuple[str, ...], Path]
T = TypeVar("T")
DNS_PORT = 53
_LOG = logging.getLogger(__name__)


def setting(default: object, parse: Callable[[object], object], doc: str) -> Any:
    """A dataclass field with the value `parse(value)` of a file's value; `parse` raises ValueError."""
    metadata = {"parse": parse, "doc": doc, "default": default}
    return field(default_factory=lambda: parse(default), metadata=metadata)


def tables(kind: type, pattern: str, expected: str, called: str) -> Any:
    """A dataclass field with a mapping from names that match `pattern` to tables of `kind`."""
    return field(default_factory=dict, metadata={"tables": NamedTables(kind, re.compile(pattern), expected, called)})


class NamedTables(NamedTuple):
    """Metadata of a field made by tables()."""

    kind: type
    pattern: re.Pattern[str]
    expected: str
    called: str


def matching(pattern: str, expected: str) -> Callable[[object], str]:
    """A parser of text that matches the whole pattern."""
    def parse(value: object) -> str:
        if isinstance(value, str) and re.fullmatch(pattern, value):
            return value
        raise ValueError(expected)

    return parse


def flag(value: object) -> bool:
    """A parser of true and false."""
    if isinstance(value, bool):
        return value
    raise ValueError("true or false")


def number(low: float, high: float, kind: type[T]) -> Callable[[object], T]:
    """A parser of numbers from `low` to `high`, both included."""
    def parse(value: object) -> T:
        whole = "a whole number" if kind is int else "a number"
        types = (int,) if kind is int else (int, float)
        if isinstance(value, types) and not isinstance(value, bool) and low <= value <= high:
            return kind(value)  # type: ignore[call-arg]
        raise ValueError(f"{whole} from {low:g} to {high:g}")

    return parse


def word_or(word: str, parse: Callable[[object], T]) -> Callable[[object], T | None]:
    """A parser that returns None for `word`, and parses anything else with `parse`."""

    def parse_either(value: object) -> T | None:
        if value == word:
            return None
        try:
            return parse(value)
        except ValueError as error:
            raise ValueError(f'"{word}" or {error}') from None

    return parse_either


def auto_or(parse: Callable[[object], T]) -> Callable[[object], T | None]:
    """A parser that returns None for "auto", and parses anything else with `parse`."""
    return word_or("auto", parse)


def positive_duration(value: object) -> float:
    """Seconds of a duration such as "90s". Raises ValueError unless it is above 0."""
    duration_s = parse_duration(value)
    if duration_s <= 0:
        raise ValueError("a time above 0")
    return duration_s


def networks(value: object) -> tuple[Network, ...]:
    """The networks of a list in CIDR notation. Raises ValueError."""
    expected = 'a list of networks such as ["127.0.0.0/8", "10.1.0.0/16"]'
    if not isinstance(value, list):
        raise ValueError(expected)
    try:
        return tuple(ipaddress.ip_network(item) for item in value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{expected}; {error}") from None


def dns_domain(value: object) -> str:
    """A DNS domain in which each slot has a host name. Raises ValueError."""
    # A DNS name has at most 253 characters, of which a slot id with its dot takes up to 30.
    part = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    name = rf"(?=.{{1,223}}$)(?!(.*\.)?\d+$)({part}\.)*{part}"
    return matching(name, 'a DNS name in lower case, such as "nb.example.org"')(value)


@dataclass(frozen=True)
class DnsServer:
    """A DNS server, by its address or name."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DNS_PORT else f"{host}:{self.port}"


def dns_server(value: object) -> DnsServer:
    """The server of an address or a name, with or without a port. Raises ValueError."""
    expected = 'an address or a name such as "10.1.0.53", "[2001:db8::53]:5353" or "ns1.example.org"'
    pattern = r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+))(?::(\d{1,5}))?"
    match = re.fullmatch(pattern, value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(expected)
    host, port = match[1] or match[2], int(match[3] or DNS_PORT)
    try:
        if match[1] or re.fullmatch(r"[\d.]+", host):
            host = str(ipaddress.ip_address(host))
        else:
            dns_domain(host)
    except ValueError:
        raise ValueError(expected) from None
    if not 1 <= port <= 65535:
        raise ValueError(f"{expected}, with a port from 1 to 65535")
    return DnsServer(host, port)


def read_tables(files: Iterable[Path]) -> tuple[dict[str, object], dict[tuple[str, ...], Path]]:
    """The merged content of the files, and the file that each key came from. Raises ConfigError."""
    tables: dict[str, object] = {}
    origin: dict[tuple[str, ...], Path] = {}
    for file in files:
        try:
            document = tomllib.loads(file.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: not valid TOML: {error}", file=str(file)) from None
        except OSError as error:
            raise ConfigError(f"{file}: {os.strerror(error.errno or 0)}", file=str(file)) from None
        _merge(tables, document, file, origin, ())
    return tables, origin


def _merge(
    into: dict[str, object],
    document: Mapping[str, object],
    file: Path,
    origin: dict[tuple[str, ...], Path],
    prefix: tuple[str, ...],
) -> None:
    for key, value in document.items():
        origin[*prefix, key] = file
        if isinstance(value, dict):
            below = into.get(key)
            if not isinstance(below, dict):
                below = into[key] = {}
            _merge(below, value, file, origin, (*prefix, key))
        else:
            into[key] = value


def rename_section(
    tables: Mapping[str, object], origin: Origin, old: str, new: str
) -> tuple[Mapping[str, object], Origin]:
    """`tables` and `origin` with the settings of the deprecated section `old` in the section `new`.

    Both sections may be present, because the package's own file has the header of `new` with every setting commented
    out. Logs a warning when `old` is used. Raises ConfigError when a setting is in both.
    """
    if old not in tables:
        return tables, origin
    file = origin.get((old,))
    where = f"{file}: " if file else ""
    former, present = tables[old], tables.get(new, {})
    if not isinstance(former, Mapping) or not isinstance(present, Mapping):
        raise ConfigError(f"{where}{old}: expected a table", file=str(file or ""), key=old, expected="a table")
    for name in former.keys() & present.keys():
        raise ConfigError(
            f"{where}{old}.{name} and {new}.{name} are the same setting; expected only {new}.{name}",
            file=str(file or ""), key=f"{old}.{name}", expected=f"only {new}.{name}",
        )
    _LOG.warning("%ssection [%s] is deprecated; rename it to [%s]", where, old, new)
    renamed = {(new, *key[1:]): path for key, path in origin.items() if key[0] == old and len(key) > 1}
    return (
        {name: table for name, table in tables.items() if name != old} | {new: {**present, **former}},
        {key: path for key, path in origin.items() if key[0] != old} | renamed,
    )


@dataclass(frozen=True)
class Reader:
    """Makes dataclasses of tables; its errors name the file that the wrong key came from."""

    origin: Origin

    def error(self, key: tuple[str, ...], expected: str) -> ConfigError:
        """The error for a wrong value of `key`."""
        file, name = self.origin.get(key), ".".join(key)
        where = f"{file}: " if file else ""
        return ConfigError(
            f"{where}{name}: expected {expected}", file=str(file or ""), key=name, expected=expected
        )

    def section(self, kind: type[T], table: object, prefix: tuple[str, ...]) -> T:
        """A `kind` with the settings of `table`, whose name is `prefix`. Raises ConfigError."""
        if not isinstance(table, Mapping):
            raise self.error(prefix, "a table")
        fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
        values: dict[str, object] = {}
        for name, value in table.items():
            key = (*prefix, name)
            if name not in fields:
                raise self._unknown(key, list(fields))
            values[name] = self._value(kind, fields[name], value, key)
        return kind(**values)

    def _value(self, kind: type, setting: dataclasses.Field[object], value: object, key: tuple[str, ...]) -> object:
        if parse_value := setting.metadata.get("parse"):
            try:
                return parse_value(value)
            except ValueError as error:
                raise self.error(key, str(error)) from None
        if tables := setting.metadata.get("tables"):
            if not isinstance(value, Mapping):
                raise self.error(key, f"a table of {tables.called}")
            for name in value:
                if not tables.pattern.fullmatch(name):
                    raise self.error((*key, name), tables.expected)
            return {name: self.section(tables.kind, item, (*key, name)) for name, item in value.items()}
        return self.section(typing.get_type_hints(kind)[setting.name], value, key)

    def _unknown(self, key: tuple[str, ...], known: list[str]) -> ConfigError:
        near = difflib.get_close_matches(key[-1], known, 1, 0.5)
        expected = f'"{near[0]}"?' if near else "one of " + ", ".join(sorted(known))
        file, name = self.origin.get(key), ".".join(key)
        where = f"{file}: " if file else ""
        return ConfigError(
            f"{where}unknown setting {name}; did you mean {expected}" if near
            else f"{where}unknown setting {name}; known here: {', '.join(sorted(known))}",
            file=str(file or ""), key=name, expected=expected,
        )

