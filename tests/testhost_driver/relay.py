# SPDX-License-Identifier: BSD-3-Clause
"""Relays the connections of an inherited listening socket to a port of 127.0.0.1.

    python3 -IS relay.py PORT

The listening socket is the first of sd_listen_fds(3). Both connections of a pair have TCP_NODELAY, which asyncio sets:
without it Linux holds back a small segment until the peer has acknowledged the one before, for up to 40 ms.
systemd-socket-proxyd does not set it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys

LISTEN_FD = 3
CHUNK_BYTES = 1 << 18


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copies bytes until the end of `reader`, and passes the end on. Closes the connection on an error of either."""
    try:
        while chunk := await reader.read(CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.transport.abort()


async def relay(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection, until both directions have ended."""
    try:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        writer.transport.abort()
        return
    await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))
    for each in (writer, there_writer):
        each.close()
        with contextlib.suppress(OSError):
            await each.wait_closed()


async def main(port: int) -> None:
    listener = socket.socket(fileno=LISTEN_FD)
    server = await asyncio.start_server(lambda reader, writer: relay(port, reader, writer), sock=listener, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
