# SPDX-License-Identifier: BSD-3-Clause
"""Entries for the journal in journald's native protocol, from services that must not wait for journald.

libsystemd's sd_journal_sendv(3) waits without a limit while journald does not read, for example because its disk is
slow. A journald that is busy delays a sender here until it has read; one that reads nothing for STALL_S delays it once,
and further entries are lost until it reads again. Their number is then an entry itself.
"""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Callable, Mapping

PATH = "/run/systemd/journal/socket"
STALL_S = 1.0
# Below net.core.wmem_default; a text of a caller or an image is shorter.
_VALUE_MAX_CHARACTERS = 8192


class Journal:
    """The socket of journald; systemd holds its other end while journald restarts. `lost` makes the entry of a loss."""

    def __init__(self, lost: Callable[[int], Mapping[str, str]], path: str = PATH) -> None:
        self._lost = lost
        self._path = path
        self._socket: socket.socket | None = None
        self._stalled = False
        self._count = 0

    def send(self, fields: Mapping[str, str]) -> None:
        """Sends an entry. No value has a line break, which needs a form of its own."""
        if self._count and self._send(_encode(self._lost(self._count))):
            self._count = 0
        if not self._send(_encode(fields)):
            self._count += 1

    def close(self) -> None:
        """Closes the socket; the next entry opens another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, entry: bytes) -> bool:
        """Whether the entry was sent. A second try follows the end of the socket's other end."""
        for _ in range(2):
            try:
                connection = self._connected()
                try:
                    connection.send(entry)
                except BlockingIOError:
                    if self._stalled or not _is_read(connection):
                        self._stalled = True
                        return False
                    connection.send(entry)
                self._stalled = False
                return True
            except BlockingIOError:  # another sender was faster
                return False
            except OSError as error:
                self.close()
                if error.errno not in (errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE):
                    return False  # journald does not run
        return False

    def _connected(self) -> socket.socket:
        if self._socket is None:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                made.setblocking(False)
                made.connect(self._path)
            except BaseException:
                made.close()
                raise
            self._socket = made
        return self._socket


def _is_read(connection: socket.socket) -> bool:
    """Whether journald has read an entry within STALL_S, so that there is room for another."""
    waiting = select.poll()
    waiting.register(connection, select.POLLOUT)
    return bool(waiting.poll(STALL_S * 1000))


def _encode(fields: Mapping[str, str]) -> bytes:
    return "".join(f"{name}={value[:_VALUE_MAX_CHARACTERS]}\n" for name, value in fields.items()).encode()
