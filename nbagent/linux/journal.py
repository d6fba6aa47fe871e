"""Into the journal without its library: lines by a stream, as sd_journal_stream_fd(3) does, and entries.

journald attributes each line to the process that wrote it and looks up that process's unit when it
reads the line. One that has ended by then has none any more, and its last words would be missing
from `journalctl -u`; for them journald takes the unit that the stream was opened with, which it
believes only of root.
"""

from __future__ import annotations

import socket
from typing import Mapping

STREAM_PATH = "/run/systemd/journal/stdout"
ENTRIES_PATH = "/run/systemd/journal/socket"
LOG_INFO = 6


def stream(identifier: str, unit: str, path: str = STREAM_PATH) -> socket.socket:
    """A socket whose lines become journal entries of `identifier`, of `unit` at the least. Raises OSError.

    The header's lines are: identifier, unit, priority, and whether levels are parsed and lines
    forwarded to syslog, kmsg and console (systemd's src/libsystemd/sd-journal/journal-send.c).
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
        connection.shutdown(socket.SHUT_RD)
        connection.sendall(f"{identifier}\n{unit}\n{LOG_INFO}\n0\n0\n0\n0\n".encode())
    except BaseException:
        connection.close()
        raise
    return connection


def entries(path: str = ENTRIES_PATH) -> socket.socket:
    """A socket for entries with fields, one a datagram; it outlives journald's restarts. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


def encode(fields: Mapping[str, str]) -> bytes:
    """An entry as journald's native protocol has it; no value here has a line break in it."""
    return "".join(f"{name}={value}\n" for name, value in fields.items()).encode()
