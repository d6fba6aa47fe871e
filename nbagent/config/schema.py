"""Settings as dataclasses: how one is declared, and read from TOML files, strictly.

A field says how its value is written in a file, what its default is and what it is for; so the
configuration files and their manual pages are made of the same lines that read them. A later file
wins key by key. What is not known, or wrong, is refused with the file, the key and what would be
right, because a misspelt limit that is silently ignored is worse than no program.

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
T = TypeVar("T")
_LOG = logging.getLogger(__name__)


def setting(default: Any, parse: Callable[[Any], Any], doc: str) -> Any:
    """A field whose value in a file goes through `parse`, which raises ValueError."""
    metadata = {"parse": parse, "doc": doc, "default": default}
    return field(default_factory=lambda: parse(default), metadata=metadata)


def tables(kind: type, pattern: str, expected: str, called: str) -> Any:
    """A field with a table of `kind` for each name of the shape `pattern`."""
    return field(default_factory=dict, metadata={"tables": _Tables(kind, re.compile(pattern), expected, called)})


class _Tables(NamedTuple):
    kind: type
    pattern: re.Pattern[str]
    expected: str
    called: str


def matching(pattern: str, expected: str) -> Callable[[Any], str]:
    """A parser of text that has the whole of a pattern."""
    def parse(value: Any) -> str:
        if isinstance(value, str) and re.fullmatch(pattern, value):
            return value
        raise ValueError(expected)

    return parse


def number(low: float, high: float, kind: type[T]) -> Callable[[Any], T]:
    """A parser of numbers from `low` to `high`, both included."""
    def parse(value: Any) -> T:
        whole = "a whole number" if kind is int else "a number"
        types = (int,) if kind is int else (int, float)
        if isinstance(value, types) and not isinstance(value, bool) and low <= value <= high:
            return kind(value)  # type: ignore[call-arg]
        raise ValueError(f"{whole} from {low:g} to {high:g}")

    return parse


def word_or(word: str, parse: Callable[[Any], T]) -> Callable[[Any], T | None]:
    """`word` is read as None."""

    def parse_either(value: Any) -> T | None:
        if value == word:
            return None
        try:
            return parse(value)
        except ValueError as error:
            raise ValueError(f'"{word}" or {error}') from None

    return parse_either


def auto_or(parse: Callable[[Any], T]) -> Callable[[Any], T | None]:
    """"auto" is read as None."""
    return word_or("auto", parse)


def positive_duration(value: Any) -> float:
    """Seconds of a time that is not none."""
    duration_s = parse_duration(value)
    if duration_s <= 0:
        raise ValueError("a time above 0")
    return duration_s


def networks(value: Any) -> tuple[Network, ...]:
    """A list of networks, as CIDR."""
    expected = 'a list of networks such as ["127.0.0.0/8", "10.1.0.0/16"]'
    if not isinstance(value, list):
        raise ValueError(expected)
    try:
        return tuple(ipaddress.ip_network(item) for item in value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{expected}; {error}") from None


def dns_domain(value: Any) -> str:
    """A name in the DNS below which slots have theirs."""
    # An id with its dot takes 30 of the 253 characters that a name in the DNS may have.
    part = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    name = rf"(?=.{{1,223}}$)(?!(.*\.)?\d+$)({part}\.)*{part}"
    return matching(name, 'a DNS name in lower case, such as "nb.example.org"')(value)


def read_tables(files: Iterable[Path]) -> tuple[dict[str, Any], dict[tuple[str, ...], Path]]:
    """What the files say together, and which of them each key came from. Raises ConfigError."""
    tables: dict[str, Any] = {}
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
    into: dict[str, Any],
    document: Mapping[str, Any],
    file: Path,
    origin: dict[tuple[str, ...], Path],
    prefix: tuple[str, ...],
) -> None:
    for key, value in document.items():
        origin[*prefix, key] = file
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, file, origin, (*prefix, key))
        elif isinstance(value, dict):
            into[key] = {}
            _merge(into[key], value, file, origin, (*prefix, key))
        else:
            into[key] = value


def rename_section(
    tables: Mapping[str, Any], origin: Mapping[tuple[str, ...], Path], old: str, new: str
) -> tuple[Mapping[str, Any], Mapping[tuple[str, ...], Path]]:
    """`tables` and `origin` with the section `old` under its name of today, `new`.

    Logs a warning when `old` is used. Raises ConfigError when both sections are present.
    """
    if old not in tables:
        return tables, origin
    file = origin.get((old,))
    where = f"{file}: " if file else ""
    if new in tables:
        raise ConfigError(
            f"{where}sections [{old}] and [{new}] are the same; expected only [{new}]",
            file=str(file or ""), key=old, expected=f"only [{new}]",
        )
    _LOG.warning("%ssection [%s] is deprecated; rename it to [%s]", where, old, new)
    return (
        {new if name == old else name: table for name, table in tables.items()},
        {(new, *key[1:]) if key[0] == old else key: path for key, path in origin.items()},
    )


@dataclass(frozen=True)
class Reader:
    """Makes dataclasses of tables; what is wrong it names with the file it came from."""

    origin: Mapping[tuple[str, ...], Path]

    def error(self, key: tuple[str, ...], expected: str) -> ConfigError:
        """That `key` is not what is expected."""
        file, name = self.origin.get(key), ".".join(key)
        where = f"{file}: " if file else ""
        return ConfigError(
            f"{where}{name}: expected {expected}", file=str(file or ""), key=name, expected=expected
        )

    def section(self, kind: type[T], table: Any, prefix: tuple[str, ...]) -> T:
        """A `kind` of the table that is named `prefix`. Raises ConfigError."""
        if not isinstance(table, Mapping):
            raise self.error(prefix, "a table")
        fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
        values: dict[str, Any] = {}
        for name, value in table.items():
            key = (*prefix, name)
            if name not in fields:
                raise self._unknown(key, list(fields))
            values[name] = self._value(kind, fields[name], value, key)
        return kind(**values)

    def _value(self, kind: type, setting: dataclasses.Field[Any], value: Any, key: tuple[str, ...]) -> Any:
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

