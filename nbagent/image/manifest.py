"""/etc/nbagent-image.toml: what an image says about itself.

Pure: text in, a `Manifest` out, or an `ImageInvalid` that names the key and what would be right. The text
comes from an image, so nothing in it is believed: paths are only spelled out here and resolved, inside the
image, by others.
"""

from __future__ import annotations

import difflib
import posixpath
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from nbagent.errors import ImageInvalid

PATH = "etc/nbagent-image.toml"
MAX_BYTES = 64 * 1024

# How a slot of the image can be started. `exec`: its own `python -m jupyterlab`, cold.
LAUNCHES = ("exec",)

_KEYS = ("python", "home", "user", "launch", "environment", "static")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_PREFIX = re.compile(r"(?:[A-Za-z0-9_@][A-Za-z0-9_.@-]*(?:/[A-Za-z0-9_@][A-Za-z0-9_.@-]*)*)?")


@dataclass(frozen=True)
class Manifest:
    """`static` maps URL prefixes below `{base_url}static/` to directories of the image."""

    python: str
    home: str
    user: str
    launch: str
    environment: Mapping[str, str]
    static: Mapping[str, str]


def parse(text: str) -> Manifest:
    """The manifest in `text`. Raises ImageInvalid."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ImageInvalid(f"/{PATH} is not TOML: {error}") from None
    return from_mapping(data)


def from_mapping(data: Mapping[str, Any]) -> Manifest:
    """The manifest with these keys and values, each checked. Raises ImageInvalid."""
    for key in data:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, 1)
            raise _wrong(
                key, f"no such key; did you mean {near[0]}?" if near else f"no such key; known: {_KEYS}"
            )
    user = data.get("user")
    if not isinstance(user, str) or not _USER.fullmatch(user):
        raise _wrong("user", 'expected the name of a user of the image, such as "jovyan"')
    launch = data.get("launch", LAUNCHES[0])
    if launch not in LAUNCHES:
        raise _wrong("launch", "expected " + " or ".join(f'"{known}"' for known in LAUNCHES))
    return Manifest(
        python=_path("python", data.get("python"), "/usr/bin/python3"),
        home=_path("home", data.get("home"), "/home/jovyan"),
        user=user,
        launch=launch,
        environment=_environment(data.get("environment", {})),
        static=_static(data.get("static", {})),
    )


def to_mapping(manifest: Manifest) -> dict[str, Any]:
    """What `from_mapping` takes, in JSON's types."""
    return {
        key: dict(value) if isinstance(value := getattr(manifest, key), Mapping) else value for key in _KEYS
    }


def _wrong(key: str, what: str) -> ImageInvalid:
    return ImageInvalid(f"/{PATH}: {key}: {what}", key=key, expected=what)


def _path(key: str, value: object, example: str) -> str:
    if (
        isinstance(value, str)
        and value.startswith("/")
        and not value.startswith("//")
        and value != "/"
        and posixpath.normpath(value) == value
        and value.isprintable()
    ):
        return value
    raise _wrong(key, f'expected an absolute path without "..", such as "{example}"')


def _environment(value: object) -> Mapping[str, str]:
    if not isinstance(value, dict):
        raise _wrong("environment", 'expected a table, such as LANG = "C.UTF-8" below [environment]')
    for name, text in value.items():
        if not _VARIABLE.fullmatch(name):
            raise _wrong(f"environment.{name}", "expected a name of letters, digits and _")
        if not isinstance(text, str) or "\0" in text:
            raise _wrong(f"environment.{name}", "expected a text without NUL")
    return MappingProxyType(dict(value))


def _static(value: object) -> Mapping[str, str]:
    if not isinstance(value, dict):
        raise _wrong("static", 'expected a table, such as "lab" = "/usr/local/share/jupyter/lab/static"')
    for prefix in value:
        if not _PREFIX.fullmatch(prefix):
            raise _wrong(
                f"static.{prefix!r}", 'expected a relative URL path such as "lab", or "" for all the rest'
            )
    return MappingProxyType(
        {
            prefix: _path(f"static.{prefix!r}", path, "/usr/local/share/jupyter/lab/static")
            for prefix, path in value.items()
        }
    )
