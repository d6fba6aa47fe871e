# SPDX-License-Identifier: BSD-3-Clause
"""Tokens in requests, and the files with the valid ones."""

from __future__ import annotations

import hmac
from pathlib import Path


class TokenFile:
    """The token in a file, which is read again whenever the file has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._token = b""
        self.read()

    def read(self) -> bytes:
        """The token, empty when the file is absent or this process may not read it."""
        try:
            status = self.path.stat()
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if seen != self._seen:
                self._token, self._seen = self.path.read_bytes().strip(), seen
        except OSError:
            self._token, self._seen = b"", None
        return self._token

    def matches(self, given: str) -> bool:
        """Whether `given` is the token, compared in constant time."""
        token = self.read()
        return bool(token) and hmac.compare_digest(given.encode(errors="replace"), token)


def bearer_token(authorization: str) -> str | None:
    """The token of an Authorization header, None when it has none.

    Another scheme counts as none, because clients such as requests send Basic credentials of a .netrc on their own.
    """
    scheme, _, credentials = authorization.partition(" ")
    return credentials.strip() if scheme.lower() in ("bearer", "token") else None
