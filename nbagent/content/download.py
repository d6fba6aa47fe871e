# SPDX-License-Identifier: BSD-3-Clause
"""Downloads an archive from a web server, with redirects to URLs that the operator allows.

No cookie and no password, because the slot's user could download no more, and the HTTP proxy of the host's settings
only, which the slot's user has as well. All modules and codecs are loaded with
this one, because after the process has entered the slot, an import would load the image's files.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import codecs
import contextlib
import http.client
import io
import ssl
from typing import Any, Dict, Iterator, List, Optional, Sequence
from urllib.parse import urljoin

from nbagent.core import urls
from nbagent.core.proxies import HttpProxy
from nbagent.untrusted.refusal import Refused, shown

REDIRECTS_MAX = 5
SILENCE_S = 10.0
CHUNK_BYTES = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS: Dict[str, str] = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "nbagent"}

# Codecs of host names and of file names in old .zip archives. Python would load them at their first use, in the slot.
for _codec in ("ascii", "cp437", "idna", "latin-1"):
    codecs.lookup(_codec)


class _BoundedReader(io.BufferedReader):
    """The bytes of a response. http.client reads a chunk of the negative size -1 until the server closes."""

    def read(self, size: Optional[int] = -1, /) -> bytes:
        if size is None or size < 0:
            raise http.client.HTTPException("the response has a chunk of a negative size")
        return super().read(size)


class _Response(http.client.HTTPResponse):
    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.fp = _BoundedReader(self.fp.detach())


class Body:
    """The body of a response. `read` raises Refused if it is malformed or ends before its Content-Length."""

    def __init__(self, host: str, response: http.client.HTTPResponse) -> None:
        self._host, self._response = host, response
        self._missing_bytes: Optional[int] = response.length

    def read(self, size: int = -1, /) -> bytes:
        with _refused(self._host):
            chunk = self._response.read(CHUNK_BYTES if size < 0 else size)
        if self._missing_bytes is not None:
            self._missing_bytes -= len(chunk)
            if not chunk and size and self._missing_bytes > 0:
                raise Refused(f"{self._host}: the response ended {self._missing_bytes} bytes too early")
        return chunk


@contextlib.contextmanager
def get(
    url: str, allowed: List[str], context: ssl.SSLContext, proxy: Optional[HttpProxy] = None,
    direct: Sequence[str] = (),
) -> Iterator[Body]:
    """The body of the response to a GET of `url`, by `proxy` unless its host is in the networks `direct`. Raises
    Refused."""
    prefixes = [urls.parse(prefix) for prefix in allowed]
    with contextlib.ExitStack() as stack:
        for _ in range(REDIRECTS_MAX + 1):
            try:
                target = urls.parse(url)
            except ValueError:
                raise Refused(f"redirected to {shown(url)}, which is not a valid URL for an archive") from None
            if not any(target.is_below(prefix) for prefix in prefixes):
                raise Refused(f"redirected to {url}, which this host does not allow")
            by = proxy if proxy is not None and proxy.serves(target.host, direct) else None
            with _refused(f"{target.host} by the proxy {by}" if by else target.host):
                connection = stack.enter_context(contextlib.closing(_connection(target, context, by)))
                absolute = by is not None and target.scheme == "http"
                connection.request("GET", target.absolute if absolute else target.target, headers=_HEADERS)
                response = stack.enter_context(connection.getresponse())
            if response.status == 200:
                yield Body(target.host, response)
                return
            if response.status not in _REDIRECTS:
                raise Refused(f"{url}: the server responded {response.status} {response.reason[:80]}")
            with _refused(target.host):
                url = urljoin(url, response.headers.get("Location", ""))
        raise Refused(f"redirected more than {REDIRECTS_MAX} times")


def _connection(url: urls.Url, context: ssl.SSLContext, proxy: Optional[HttpProxy]) -> http.client.HTTPConnection:
    connection: http.client.HTTPConnection
    host, port = proxy or (url.host, url.port)
    if url.scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=SILENCE_S, context=context)
        if proxy is not None:
            connection.set_tunnel(url.host, url.port)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=SILENCE_S)
    connection.response_class = _Response
    return connection


@contextlib.contextmanager
def _refused(host: str) -> Iterator[None]:
    """Turns what http.client and urllib raise for a hostile response into Refused: more than their own errors."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Refused(f"{host}: {reason}") from error
