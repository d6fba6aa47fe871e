"""Asks a web server for an archive, and follows it to where the operator allows.

No proxy, no cookie, no password: what the slot's user could have had by hand. Everything this needs later is
imported and loaded with it, certificates too, so that it works where there is no Python of ours.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import codecs
import contextlib
import http.client
import ssl
from typing import Dict, Iterator, List, Optional
from urllib.parse import urljoin

from nbagent.content.beneath_writer import Refused
from nbagent.core import urls

REDIRECTS_MAX = 5
SILENCE_S = 10.0
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS: Dict[str, str] = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "nbagent"}

# Loaded when they are first used, which would be too late: names of hosts, and of files in old .zips.
for _codec in ("ascii", "cp437", "idna", "latin-1"):
    codecs.lookup(_codec)


class Body:
    """The body of an answer: `read` raises Refused where it ends before its Content-Length."""

    def __init__(self, host: str, response: http.client.HTTPResponse) -> None:
        self._host, self._response = host, response
        self._missing_bytes: Optional[int] = response.length

    def read(self, size: int = -1, /) -> bytes:
        with _explained(self._host):
            chunk = self._response.read(size if size >= 0 else None)
        if self._missing_bytes is not None:
            self._missing_bytes -= len(chunk)
            if not chunk and size and self._missing_bytes > 0:
                raise Refused(f"{self._host}: the answer ended {self._missing_bytes} bytes too early")
        return chunk


@contextlib.contextmanager
def get(url: str, allowed: List[str], context: ssl.SSLContext) -> Iterator[Body]:
    """The body that answers a GET of `url`. Raises Refused."""
    prefixes = [urls.parse(prefix) for prefix in allowed]
    with contextlib.ExitStack() as stack:
        for _ in range(REDIRECTS_MAX + 1):
            try:
                found = urls.parse(url)
            except ValueError:
                raise Refused(f"redirected to {url!r}, which is no URL that could be allowed") from None
            if not any(found.is_below(prefix) for prefix in prefixes):
                raise Refused(f"redirected to {url}, which this host does not allow")
            with _explained(found.host):
                connection = stack.enter_context(contextlib.closing(_connection(found, context)))
                connection.request("GET", found.target, headers=_HEADERS)
                response = stack.enter_context(connection.getresponse())
            if response.status == 200:
                yield Body(found.host, response)
                return
            if response.status not in _REDIRECTS:
                raise Refused(f"{url} was answered {response.status} {response.reason}")
            url = urljoin(url, response.headers.get("Location", ""))
        raise Refused(f"redirected more than {REDIRECTS_MAX} times")


def _connection(url: urls.Url, context: ssl.SSLContext) -> http.client.HTTPConnection:
    if url.scheme == "https":
        return http.client.HTTPSConnection(url.host, url.port, timeout=SILENCE_S, context=context)
    return http.client.HTTPConnection(url.host, url.port, timeout=SILENCE_S)


@contextlib.contextmanager
def _explained(host: str) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Refused(f"{host}: {reason}") from error
