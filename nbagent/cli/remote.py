# SPDX-License-Identifier: BSD-3-Clause
"""A client of the control API. Problem documents are raised as the exceptions that they describe.

It uses no proxy from the environment and follows no redirect, so that the token is sent to the named host only.
http.client and ssl are imported when a call is made, because `nbagent --version` makes none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nbagent.core import paths
from nbagent.core.errors import ConfigError, InvalidField, NbagentError, from_wire

DEFAULT_URL = "http://127.0.0.1:9000"
# More than the time that a claim waits by default (pool.claim_timeout and claims.timeout).
TIMEOUT_S = 60.0
_TYPE_PREFIX = "urn:nbagent:problem:"


class ApiUnavailable(NbagentError):
    """No server responds at the URL, or it is not the control API."""

    code = "api-unavailable"
    title = "The control API does not respond"
    exit_status = 69  # EX_UNAVAILABLE of sysexits.h


def read_token(path: Path | None) -> str | None:
    """The token in `path`; without a path, this host's token, or None if it is unreadable. Raises ConfigError."""
    try:
        token = (path or paths.TOKEN).read_bytes().strip().decode("ascii")
    except OSError as error:
        if path is None:
            return None
        raise ConfigError(f"{path}: {error.strerror}", file=str(path)) from None
    except UnicodeDecodeError:
        token = ""
    if token.isprintable() and token:
        return token
    raise ConfigError(f"{path or paths.TOKEN}: does not contain a token", file=str(path or paths.TOKEN))


class Remote:
    """The control API at `url`."""

    def __init__(self, url: str = DEFAULT_URL, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.token = token
        try:
            parts = urlsplit(self.url)
            self._host, self._port = parts.hostname, parts.port
        except ValueError:
            self._host = None
        if self._host is None or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
            raise InvalidField(field="--url", value=url, expected=f'a URL such as "{DEFAULT_URL}"')
        self._is_tls, self._prefix = parts.scheme == "https", parts.path

    def call(
        self, method: str, path: str, body: Mapping[str, object] | None = None, key: str | None = None
    ) -> Any:
        """The JSON document of the response. Raises the NbagentError of a problem document, or ApiUnavailable."""
        import http.client

        kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        connection = kind(self._host or "", self._port, timeout=TIMEOUT_S)
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, self._prefix + path, payload, self._headers(body is not None, key))
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or error or type(error).__name__
            raise ApiUnavailable(
                f"no response from {self.url}: {reason}; is nbagent-api.socket active?"
            ) from None
        finally:
            connection.close()
        return self._document(response.status, text)

    def _headers(self, has_body: bool, key: str | None) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": "nbagent"}
        if has_body:
            headers["Content-Type"] = "application/json"
        if key is not None:
            # http.client encodes headers as Latin-1. The API refuses a key with replaced characters.
            headers["Idempotency-Key"] = key.encode("ascii", "replace").decode()
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        return headers

    def _document(self, status: int, text: bytes) -> Any:
        try:
            document = json.loads(text)
        except ValueError:
            raise ApiUnavailable(f"{self.url} is not the control API: status {status} without JSON") from None
        if status < 400:
            return document
        raise error_of_problem(document, status)


def error_of_problem(problem: object, status: int) -> NbagentError:
    """The exception that a problem document describes."""
    if not isinstance(problem, dict):
        return NbagentError(f"the API responded with status {status}")
    code = str(problem.get("type", "")).removeprefix(_TYPE_PREFIX)
    standard = {"type", "title", "status", "detail", "message", "self"}
    details = {str(name): value for name, value in problem.items() if name not in standard}
    message = str(problem.get("detail") or problem.get("title") or f"the API responded with status {status}")
    return from_wire({"code": code, "message": message, "details": details})
