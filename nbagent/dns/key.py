# SPDX-License-Identifier: BSD-3-Clause
"""Reads a TSIG key: the output of BIND's tsig-keygen or of Knot's keymgr -t, or a line ALGORITHM:NAME:SECRET.

A service gets the key as a systemd credential, because its user cannot read the file.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from nbagent.core import paths
from nbagent.core.errors import ConfigError

EXPECTED = "the output of tsig-keygen or keymgr -t, or a line hmac-sha256:NAME:SECRET"
_CREDENTIAL = "dns-key"
_ALGORITHMS = ("hmac-sha224", "hmac-sha256", "hmac-sha384", "hmac-sha512")
_NAME = r"[A-Za-z0-9_.-]{1,253}"
# keymgr -t prints such a line as a comment above its YAML.
_LINE = re.compile(rf"^(?:#\s*)?(hmac-\w+):({_NAME}):([A-Za-z0-9+/=]+)\s*$", re.MULTILINE)
_BIND = re.compile(
    rf'key\s+"?(?P<name>{_NAME})"?\s*\{{\s*(?=[^}}]*algorithm\s+"?(?P<algorithm>[\w-]+)"?\s*;)'
    r'(?=[^}]*secret\s+"(?P<secret>[^"]*)"\s*;)'
)


@dataclass(frozen=True)
class Key:
    """A TSIG key. The secret is not printed."""

    name: str
    algorithm: str
    secret: bytes = field(repr=False)


def read(path: Path | None = None) -> Key:
    """The key in a file, by default the service's credential, or else /etc/nbagent/dns-key. Raises ConfigError."""
    shown = paths.DNS_KEY if path is None else path
    try:
        text = (path or _default_path()).read_text(errors="replace")
    except OSError as error:
        raise ConfigError(f"TSIG key {shown}: {error.strerror}; expected {EXPECTED}", file=str(shown)) from None
    if not text.strip():
        # SetCredential= of the units takes the place of a file that does not exist.
        raise ConfigError(f"TSIG key {shown}: empty or absent; expected {EXPECTED}", file=str(shown))
    return parse(text, str(shown))


def parse(text: str, file: str) -> Key:
    """The key in a text. Raises ConfigError, which names `file` and never has a part of the text."""
    if match := _BIND.search(text):
        name, algorithm, secret = match["name"], match["algorithm"], match["secret"]
    elif match := _LINE.search(text):
        algorithm, name, secret = match.groups()
    else:
        raise ConfigError(f"TSIG key {file}: expected {EXPECTED}", file=file)
    if algorithm.lower() not in _ALGORITHMS:
        raise ConfigError(f"TSIG key {file}: algorithm: expected one of {', '.join(_ALGORITHMS)}", file=file)
    try:
        decoded = base64.b64decode(secret, validate=True)
    except binascii.Error:
        decoded = b""
    if not decoded:
        raise ConfigError(f"TSIG key {file}: secret: expected base64", file=file)
    return Key(name.rstrip("."), algorithm.lower(), decoded)


def _default_path() -> Path:
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    credential = Path(directory, _CREDENTIAL) if directory else paths.DNS_KEY
    return credential if credential.exists() else paths.DNS_KEY
