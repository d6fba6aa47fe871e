# SPDX-License-Identifier: BSD-3-Clause
"""/etc/nbagent-image.toml: the program of an image's slots, and how it is started.

Pure: text in, a `Manifest` out, or an `ImageInvalid` that names the key and the expected value. The text comes from an
image, so it is untrusted: paths are checked for their form only, and resolved inside the image elsewhere.

A new key is a field of `Program` and a line in `from_mapping`.
"""

from __future__ import annotations

import difflib
import posixpath
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from nbagent.core.errors import ImageInvalid
from nbagent.untrusted.refusal import plain

PATH = "etc/nbagent-image.toml"
MAX_BYTES = 64 * 1024
# tomllib takes a time that grows with the square of the parts of a key: 15 s for a key of 60 KB.
_DOTS_MAX = 500

# `fork`: a notebook server is started once, and each slot is a fork of it.
# `exec`: the program is started anew for each slot. A command has no other way.
LAUNCHES = ("fork", "exec")

# The command and the environment are sent to the launcher in one message.
_PROGRAM_MAX_BYTES = 32 * 1024
USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
MODULE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_URL_PATH = r"[A-Za-z0-9._~%!$&'()*+,;=:@-][A-Za-z0-9/._~%!$&'()*+,;=:@-]{0,999}"
_READY = re.compile(rf"(?:{_URL_PATH})?")
_URL = re.compile(rf"(?:{_URL_PATH})?(?:\?(?:\{{token\}}|[A-Za-z0-9/._~%!$&'()*+,;=:@?-])+)?")
_PREFIX = re.compile(r"(?:[A-Za-z0-9_@][A-Za-z0-9_.@-]*(?:/[A-Za-z0-9_@][A-Za-z0-9_.@-]*)*)?")


@dataclass(frozen=True, kw_only=True)
class Program:
    """The program of a slot: `python`, an interpreter that has JupyterLab, or `command`.

    A command serves HTTP on `port` of the slot's own loopback. In it and in `environment`, `{base_path}`,
    `{port}` and `{token}` stand for the slot's. Below the slot's address, `ready` is requested until the program
    responds, and `url` is the target of a claim's link. `preload` are modules that the notebook server of `launch`
    "fork" and its kernels import before there is a slot, `extensions_after_fork` are extensions of that server that
    each slot loads itself, and `share_memory` prepares that server's memory so that its
    slots share most of it. `activate` is a script of a shell that sets variables before the notebook server starts.
    `python`, `home` and `directory` are paths inside the image.
    """

    python: str | None
    command: tuple[str, ...]
    port: int | None
    ready: str
    url: str
    home: str
    directory: str
    user: str
    launch: str
    preload: tuple[str, ...]
    environment: Mapping[str, str]
    share_memory: bool = True
    extensions_after_fork: tuple[str, ...] = ()
    activate: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest(Program):
    """A program, and the files that the router serves without it.

    `static` maps URL prefixes below `{base_url}static/` to directories of the image.
    """

    static: Mapping[str, str]


_KEYS = tuple(field.name for field in fields(Manifest))


def parse(content: bytes) -> Manifest:
    """The manifest in a file's `content`. Raises ImageInvalid."""
    if len(content) > MAX_BYTES:
        raise ImageInvalid(f"/{PATH} is larger than {MAX_BYTES} bytes")
    if any(line.count(b".") > _DOTS_MAX for line in content.splitlines()):
        raise ImageInvalid(f"/{PATH} has a line with more than {_DOTS_MAX} dots")
    try:
        data = tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ImageInvalid(f"/{PATH} is not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        # tomllib raises a plain ValueError for a number of more than 4,300 digits.
        raise ImageInvalid(f"/{PATH} is not TOML: {error}") from None
    return from_mapping(data)


def from_mapping(data: Mapping[str, object]) -> Manifest:
    """The manifest with these keys and values, each checked. Raises ImageInvalid."""
    for key in data:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, 1)
            raise _wrong(
                key, f"no such key; did you mean {near[0]}?" if near else f"no such key; known: {_KEYS}"
            )
    user = data.get("user")
    if not isinstance(user, str) or not USER.fullmatch(user):
        raise _wrong("user", 'expected the name of a user of the image, such as "jovyan"')
    if ("python" in data) == ("command" in data):
        raise _wrong("python", "expected either python, for JupyterLab, or a command, and not both")
    python = _path("python", data["python"], "/usr/bin/python3") if "python" in data else None
    if python and "port" in data:
        raise _wrong("port", "only a command has a port, because JupyterLab inherits its socket")
    home = _path("home", data.get("home"), "/home/jovyan")
    launches = LAUNCHES if python else LAUNCHES[1:]
    launch = data.get("launch", launches[0])
    if not isinstance(launch, str) or launch not in launches:
        raise _wrong("launch", "expected " + " or ".join(f'"{known}"' for known in launches))
    preload = _modules("preload", data.get("preload", []))
    extensions_after_fork = _modules("extensions_after_fork", data.get("extensions_after_fork", []))
    if extensions_after_fork and launch != "fork":
        raise _wrong("extensions_after_fork", 'expected launch = "fork", because another server is not forked')
    if preload and launch != "fork":
        raise _wrong("preload", 'expected launch = "fork", because only its notebook server imports modules early')
    share_memory = data.get("share_memory", True)
    if not isinstance(share_memory, bool):
        raise _wrong("share_memory", "expected true or false")
    if not share_memory and launch != "fork":
        raise _wrong("share_memory", 'expected launch = "fork", because only forked slots share the memory of a server')
    command = () if python else _command(data["command"])
    activate = data.get("activate", "")
    if not isinstance(activate, str) or not _is_argument(activate):
        raise _wrong("activate", 'expected a script of a shell, such as ". /opt/course/setup.sh", without NUL')
    if activate and not python:
        raise _wrong("activate", "expected python, because a command sets its variables itself")
    environment = _environment(data.get("environment", {}))
    if sum(map(len, (*command, activate, *environment, *environment.values()))) > _PROGRAM_MAX_BYTES:
        raise _wrong("environment", f"longer than {_PROGRAM_MAX_BYTES} characters, command and activate included")
    return Manifest(
        python=python,
        command=command,
        port=None if python else _port(data.get("port", 8888)),
        ready=_address("ready", data.get("ready", "api" if python else ""), _READY, "health"),
        url=_address("url", data.get("url", "lab?token={token}" if python else ""), _URL, "?token={token}"),
        home=home,
        directory=_path("directory", data.get("directory", home), home),
        user=user,
        launch=launch,
        preload=preload,
        share_memory=share_memory,
        extensions_after_fork=extensions_after_fork,
        activate=activate,
        environment=environment,
        static=_static(data.get("static", {})),
    )


def to_mapping(manifest: Manifest) -> dict[str, object]:
    """The mapping that `from_mapping` reads, in JSON's types and without defaults."""
    mapping: dict[str, object] = {}
    for field in fields(Manifest):
        value = getattr(manifest, field.name)
        if isinstance(value, Mapping):
            mapping[field.name] = dict(value)
        elif value is not None and value != () and value != field.default:
            mapping[field.name] = list(value) if isinstance(value, tuple) else value
    return mapping


def _wrong(key: str, what: str) -> ImageInvalid:
    key = plain(key)
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


def _command(value: object) -> tuple[str, ...]:
    words = value if isinstance(value, list) else []
    if words and words[0] and all(_is_argument(word) for word in words):
        return tuple(words)
    raise _wrong("command", 'expected a program and its arguments, such as ["serve", "--port", "{port}"]')


def _is_argument(value: object) -> bool:
    """Whether the kernel accepts `value` as an argument or a variable of a program. JSON has lone surrogates."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _modules(key: str, value: object) -> tuple[str, ...]:
    if isinstance(value, list) and len(value) <= 200 and all(
        isinstance(name, str) and len(name) <= 200 and MODULE.fullmatch(name) for name in value
    ):
        return tuple(value)
    raise _wrong(key, 'expected names of modules, such as ["numpy", "matplotlib.pyplot"]')


def _port(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 1024 <= value <= 65535:
        return value
    raise _wrong("port", "expected a whole number from 1024 to 65535")


def _address(key: str, value: object, pattern: re.Pattern[str], example: str) -> str:
    if isinstance(value, str) and pattern.fullmatch(value) and ".." not in value.partition("?")[0].split("/"):
        return value
    raise _wrong(key, f'expected what comes after the slot\'s address, such as "{example}", without ".." and "#"')


def _environment(value: object) -> Mapping[str, str]:
    if not isinstance(value, dict):
        raise _wrong("environment", 'expected a table, such as LANG = "C.UTF-8" below [environment]')
    for name, text in value.items():
        if not VARIABLE.fullmatch(name):
            raise _wrong(f"environment.{name}", "expected a name of letters, digits and _")
        if not _is_argument(text):
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
