# SPDX-License-Identifier: BSD-3-Clause
"""Writing to the journal without libsystemd: stream sockets as by sd_journal_stream_fd(3), and native entries.

journald looks up the unit of the sending process when it reads a line. When the process has exited by then,
journald uses the unit in the stream's header instead, which it accepts only from root. Without that unit the last
lines of a process would be missing from `journalctl -u`.
"""

from __future__ import annotations

import socket
from typing import Mapping

STREAM_PATH = "/run/systemd/journal/stdout"
ENTRIES_PATH = "/run/systemd/journal/socket"
LOG_INFO = 6
# The errors of a connection while journald is stopped with its sockets.
STOPPED = (ConnectionRefusedError, FileNotFoundError)


def stream(identifier: str, unit: str, path: str = STREAM_PATH) -> socket.socket:
    """A socket whose lines become journal entries of `identifier`, and of `unit` if the sender exited. Raises OSError.

    While journald is stopped with its sockets, it is a connection that has ended, because a program runs without its
    journal.

    The header's lines are: identifier, unit, priority, and flags for parsing of level prefixes and for forwarding
    to syslog, kmsg and console (systemd's src/libsystemd/sd-journal/journal-send.c).
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
        connection.shutdown(socket.SHUT_RD)
        connection.sendall(f"{identifier}\n{unit}\n{LOG_INFO}\n0\n0\n0\n0\n".encode())
    except STOPPED:
        connection.close()
        connection, other = socket.socketpair()
        other.close()
    except BaseException:
        connection.close()
        raise
    return connection


def entries(path: str = ENTRIES_PATH) -> socket.socket:
    """A socket for native entries, one a datagram; it stays usable when journald restarts. Raises OSError.

    While journald is stopped with its sockets, it is not connected, and sending fails.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        connection.connect(path)
    except STOPPED:
        pass
    except BaseException:
        connection.close()
        raise
    return connection


def encode(fields: Mapping[str, str]) -> bytes:
    """An entry in journald's native protocol. A value must not contain a line break, which needs the binary form."""
    return "".join(f"{name}={value}\n" for name, value in fields.items()).encode()


def line_entry(identifier: str, line: bytes) -> bytes:
    """An entry like that of a line of a stream. `line` contains no line break."""
    return encode({"SYSLOG_IDENTIFIER": identifier, "PRIORITY": str(LOG_INFO)}) + b"MESSAGE=" + line + b"\n"
