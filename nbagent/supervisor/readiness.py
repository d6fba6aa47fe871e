"""Is a slot ready? One request to its socket, which waits in the backlog until it is served."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from nbagent.core.errors import StartFailed


async def ready(path: Path, url: str) -> None:
    """Returns when `GET url` on the unix socket is answered below 500. Raises StartFailed otherwise.

    A program that asks who is there, or sends one elsewhere, is ready all the same.
    There is no polling: the connection waits in the listening socket's backlog, and the answer
    comes with the first turn of the server's loop.
    """
    writer = None
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(f"GET {url} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        status = await reader.readline()
    except OSError as error:
        raise StartFailed(f"the slot's socket: {error}", step="ready") from error
    finally:
        if writer is not None:
            writer.close()
    if not re.match(rb"HTTP/1\.[01] [1-4][0-9][0-9] ", status):
        answer = status.decode(errors="replace").strip() or "nothing"
        raise StartFailed(f"GET {url} was answered {answer}", step="ready")
