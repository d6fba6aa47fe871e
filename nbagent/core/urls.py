# SPDX-License-Identifier: BSD-3-Clause
"""Allow-lists of URL prefixes: URLs are parsed once and compared by their parts, never as text.

`https://data.example.org/courses` allows the URLs below it. It allows neither `/courses-of-others`, nor
another port, nor any spelling of `/courses/../private`. The supervisor checks claims by this module, and
a process in the slot checks redirects. Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple
from urllib.parse import unquote_to_bytes, urlsplit

URL_MAX_CHARACTERS = 2000
URL_EXPECTED = 'a URL such as "https://data.example.org/courses/one.tar.gz", without a user, "..", or a fragment'
PORTS = {"http": 80, "https": 443}
# Visible ASCII without the backslash, because some parsers of URLs treat that as a slash.
_TEXT = re.compile(r"[!-\[\]-~]+")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")


class Url(NamedTuple):
    """An http or https URL. `segments` are those of its path, decoded; `target` is the request target of HTTP."""

    scheme: str
    host: str
    port: int
    segments: tuple[bytes, ...]
    target: str

    def is_below(self, prefix: Url) -> bool:
        """Whether `prefix` allows this URL: the same scheme, host and port, and a path below its path."""
        return self[:3] == prefix[:3] and self.segments[:len(prefix.segments)] == prefix.segments

    @property
    def absolute(self) -> str:
        """The URL as the request target that HTTP proxies expect."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.target}"

    def is_loopback(self) -> bool:
        """Whether the host is a loopback address. Every network namespace has its own loopback interface."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse(text: str) -> Url:
    """The parts of `text`. Raises ValueError with the expected syntax."""
    if not _TEXT.fullmatch(text) or len(text) > URL_MAX_CHARACTERS or "#" in text:
        raise ValueError(URL_EXPECTED)
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError(URL_EXPECTED) from None
    host = parts.hostname or ""
    if parts.scheme not in PORTS or "@" in parts.netloc or not _HOST.fullmatch(host):
        raise ValueError(URL_EXPECTED)
    segments = [unquote_to_bytes(segment) for segment in parts.path.split("/")[1:]]
    if any(_is_ambiguous(segment) for segment in segments):
        raise ValueError(URL_EXPECTED)
    while segments and not segments[-1]:
        segments.pop()
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Url(parts.scheme, host, PORTS[parts.scheme] if port is None else port, tuple(segments), target)


def _is_ambiguous(segment: bytes) -> bool:
    """Whether a server may interpret a decoded segment as something else than one name."""
    # Some servers remove ";parameters" before they resolve "..".
    return segment.partition(b";")[0] in (b".", b"..") or bool(re.search(rb"[/\\\x00-\x1f\x7f]", segment))
