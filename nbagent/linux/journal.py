"""A stream into the journal: what sd_journal_stream_fd(3) does, without the library.

journald attributes a stream to the process that connected it, so a slot's process connects its
own while it sits in its scope and can still see the host.
"""

from __future__ import annotations

import socket

STREAM_PATH = "/run/systemd/journal/stdout"
LOG_INFO = 6


def stream(identifier: str, path: str = STREAM_PATH) -> socket.socket:
    """A socket whose lines become journal entries of `identifier`. Raises OSError.

    The header's lines are: identifier, unit, priority, and whether levels are parsed and lines
    forwarded to syslog, kmsg and console (systemd's src/libsystemd/sd-journal/journal-send.c).
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
        connection.shutdown(socket.SHUT_RD)
        connection.sendall(f"{identifier}\n\n{LOG_INFO}\n0\n0\n0\n0\n".encode())
    except BaseException:
        connection.close()
        raise
    return connection
