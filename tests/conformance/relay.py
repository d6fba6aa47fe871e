# SPDX-License-Identifier: BSD-3-Clause
"""Forwards a unix socket to a port of 127.0.0.1: relay.py SOCKET PORT.

Runs in the file system of a slot and in the network of the test host, so that a process in the slot's network reaches
the router. Standard library only.
"""

import asyncio
import contextlib
import sys


async def main(path, port):
    async def copy(reader, writer):
        with contextlib.suppress(OSError), contextlib.closing(writer):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()

    async def forward(reader, writer):
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, back), copy(there, writer))

    server = await asyncio.start_unix_server(forward, path)
    await server.serve_forever()


asyncio.run(main(sys.argv[1], int(sys.argv[2])))
