# SPDX-License-Identifier: BSD-3-Clause
"""The readiness of a slot: one request to its socket, which waits in the backlog until the program accepts it."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from nbagent.core.errors import StartFailed
from nbagent.wire.failure import printable

# A status line has nothing but a version, a status and a reason phrase.
STATUS_LINE_MAX_BYTES = 8192
_SHOWN_MAX_CHARACTERS = 200


async def ready(path: Path, url: str) -> None:
    """Returns when the response to `GET url` on the unix socket has a status below 500. Raises StartFailed otherwise.

    A redirect or a request for a password also shows that the program serves requests. No polling is needed, because
    the kernel keeps the connection in the backlog of the listening socket until the program accepts it. The program is
    an image's code: its response is bounded, and shown without control characters.
    """
    writer = None
    try:
        reader, writer = await asyncio.open_unix_connection(str(path), limit=STATUS_LINE_MAX_BYTES)
        writer.write(f"GET {url} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        status = await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        status = error.partial
    except asyncio.LimitOverrunError:
        text = f"the response to GET {url} has no line break in its first {STATUS_LINE_MAX_BYTES} bytes"
        raise StartFailed(text, step="ready") from None
    except OSError as error:
        raise StartFailed(f"no response from {path}: {error}", step="ready") from error
    finally:
        if writer is not None:
            writer.close()
    if not re.match(rb"HTTP/1\.[01] [1-4][0-9][0-9] ", status):
        response = printable(status.decode(errors="replace").strip(), _SHOWN_MAX_CHARACTERS) or "nothing"
        raise StartFailed(f"the response to GET {url} was {response}", step="ready")
