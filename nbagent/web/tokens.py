# SPDX-License-Identifier: BSD-3-Clause
"""Tokens in requests, and the files with the valid ones.

systemd passes the tokens to a service as credentials, because the service's user has no right to read the operator's
files. It reads those files when it starts the service, so that a new token needs a restart (nbagent-token.path).
"""

from __future__ import annotations

import hmac
import os
from pathlib import Path


class TokenFile:
    """The token in a file, which is read again whenever the file has changed.

    `path` is the operator's file, for messages; `credential` is systemd's copy of it, if there is one.
    """

    def __init__(self, path: Path, credential: Path | None = None) -> None:
        self.path = path
        self._file = credential or path
        self._seen: tuple[int, int, int] | None = None
        self._token = b""
        self.read()

    def read(self) -> bytes:
        """The token, empty when the file is absent or this process may not read it."""
        try:
            status = self._file.stat()
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if seen != self._seen:
                self._token, self._seen = self._file.read_bytes().strip(), seen
        except OSError:
            self._token, self._seen = b"", None
        return self._token

    def matches(self, given: str) -> bool:
        """Whether `given` is the token, compared in constant time."""
        token = self.read()
        return bool(token) and hmac.compare_digest(given.encode(errors="replace"), token)


def passed(path: Path) -> TokenFile:
    """The token in the operator's file `path`, by the credential of that name where systemd has passed one.

    The units set an empty credential where the file does not exist.
    """
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    credential = None if directory is None else Path(directory, path.name)
    return TokenFile(path, credential if credential is not None and credential.exists() else None)


def bearer_token(authorization: str) -> str | None:
    """The token of an Authorization header, None when it has none.

    Another scheme counts as none, because clients such as requests send Basic credentials of a .netrc on their own.
    """
    scheme, _, credentials = authorization.partition(" ")
    return credentials.strip() if scheme.lower() in ("bearer", "token") else None
