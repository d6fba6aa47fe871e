"""Is a slot ready? One request to its socket, which waits in the backlog until it is served."""

from __future__ import annotations

import asyncio
from pathlib import Path

from nbagent.errors import StartFailed


async def ready(path: Path, url: str) -> None:
    """Returns when `GET url` on the unix socket is answered 200. Raises StartFailed otherwise.

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
    if b" 200 " not in status:
        answer = status.decode(errors="replace").strip() or "nothing"
        raise StartFailed(f"GET {url} was answered {answer}", step="ready")
