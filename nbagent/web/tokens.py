"""Tokens that callers show, and the files that say which one is right."""

from __future__ import annotations

import hmac
from pathlib import Path


class TokenFile:
    """The token as its file holds it now; a changed file is read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._token = b""
        self.read()

    def read(self) -> bytes:
        """The token, or nothing when there is none that this process may read."""
        try:
            status = self.path.stat()
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if seen != self._seen:
                self._token, self._seen = self.path.read_bytes().strip(), seen
        except OSError:
            self._token, self._seen = b"", None
        return self._token

    def matches(self, given: str) -> bool:
        """Whether `given` is the token, in a time that does not tell how much of it is right."""
        token = self.read()
        return bool(token) and hmac.compare_digest(given.encode(errors="replace"), token)


def bearer_token(authorization: str) -> str | None:
    """The token of an Authorization header, None when it has none.

    Another scheme, such as Basic from somebody's .netrc, says nothing to us.
    """
    scheme, _, credentials = authorization.partition(" ")
    return credentials.strip() if scheme.lower() in ("bearer", "token") else None
