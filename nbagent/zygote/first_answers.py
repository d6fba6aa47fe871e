# SPDX-License-Identifier: BSD-3-Clause
"""Several answers of the server in one response, for the page that opens.

JupyterLab's page requests thirty answers before the first cell runs, in chains of up to six. A request takes time of
the browser, the router and this server, and a chain takes as many round trips. A script in the page (first_answers.js)
requests the answers together while the browser loads the program, and gives them to the program.

The response has what the same requests would get: each is served by its own handler, with the headers of the request
for all. An answer that is not one of the server's API, or has not status 200, is left out.

Runs under the image's own Python, 3.9 and up.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, List, Optional, Tuple

from jupyter_server.base.handlers import APIHandler
from tornado import web
from tornado.httputil import HTTPConnection, HTTPHeaders, HTTPServerRequest, ResponseStartLine

# Below the base URL. The router compresses what is below api/.
PATH = "api/nbagent/answers"
ANSWERS_MAX = 40
# The page requests an answer by itself if the response for all takes longer.
TIMEOUT_S = 5.0
_SERVED = re.compile(r"(?:api|lab/api|lsp)/(?!nbagent/)")


def install(server: Any) -> None:
    """Adds the address to the server."""
    server.web_app.add_handlers(".*$", [(server.base_url + PATH, FirstAnswers, {"server": server})])


class FirstAnswers(APIHandler):
    """GET with `path` for each answer, below the base URL: a JSON object of [type, text] by path."""

    def initialize(self, server: Any) -> None:
        self._server = server

    @web.authenticated
    async def get(self) -> None:
        paths = [path for path in self.get_query_arguments("path", strip=False)[:ANSWERS_MAX] if _SERVED.match(path)]
        answers = dict(await asyncio.gather(*map(self._answer, paths)))
        self.set_header("Cache-Control", "no-store")
        self.finish({path: answer for path, answer in answers.items() if answer is not None})

    async def _answer(self, path: str) -> Tuple[str, Optional[List[str]]]:
        # The application itself during the zygote's warm-up, when the server does not serve.
        http_server = getattr(self._server, "_http_server", None)
        router = self.application if http_server is None else http_server.request_callback
        # The slot's own base URL, which is the beginning of this request's path.
        base = self.request.path[: -len(PATH)]
        response = Response()
        headers = HTTPHeaders(self.request.headers)
        # The response is read here, and the router compresses that for all.
        for name in ("Accept-Encoding", "If-None-Match"):
            headers.pop(name, None)
        request = HTTPServerRequest(
            "GET", base + path, self.request.version, headers, host=self.request.host, connection=response)
        request.remote_ip, request.protocol = self.request.remote_ip, self.request.protocol
        delegate = router.find_handler(request)
        if delegate is not None:
            delegate.finish()
            await asyncio.wait([response.finished], timeout=TIMEOUT_S)
        return path, response.answer()


class Response(HTTPConnection):
    """The connection of a request that has come by no connection: it keeps the response."""

    def __init__(self) -> None:
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._start: Optional[ResponseStartLine] = None
        self._headers = HTTPHeaders()
        self._parts: List[bytes] = []

    def answer(self) -> Optional[List[str]]:
        """Type and text of a complete response with status 200."""
        if not self.finished.done() or self._start is None or self._start.code != 200:
            return None
        try:
            return [self._headers.get("Content-Type", ""), b"".join(self._parts).decode()]
        except UnicodeDecodeError:
            return None

    def write_headers(self, start_line: Any, headers: HTTPHeaders, chunk: Optional[bytes] = None) -> Any:
        self._start, self._headers = start_line, headers
        return self.write(chunk or b"")

    def write(self, chunk: bytes) -> Any:
        self._parts.append(chunk)
        return _done()

    def finish(self) -> None:
        if not self.finished.done():
            self.finished.set_result(None)

    def set_close_callback(self, callback: Any) -> None:
        """The connection is never closed by the client."""


def _done() -> asyncio.Future[None]:
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    done.set_result(None)
    return done
