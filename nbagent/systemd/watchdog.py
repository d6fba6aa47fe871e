# SPDX-License-Identifier: BSD-3-Clause
"""systemd's watchdog (WatchdogSec=): it ends a service whose loop does not notify it, and starts the service again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time

# Without a watchdog.
_NEVER_S = 3600.0


class Watchdog:
    """Notifies systemd three times in its interval.

    By one socket, and not by sd_notify(3), which opens one each time and fails while no open file is left.
    """

    def __init__(self) -> None:
        self._interval_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 / 3
        self._next_s = 0.0
        self._socket: socket.socket | None = None
        if self._interval_s:
            self._connect()

    def notify(self) -> float:
        """Notifies systemd when it is due; the seconds until it is due again."""
        if not self._interval_s:
            return _NEVER_S
        if (now_s := time.monotonic()) >= self._next_s:
            self._send()
            self._next_s = now_s + self._interval_s
        return self._next_s - now_s

    def close(self) -> None:
        """Closes the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self) -> None:
        # A failure, as while PID 1 reads nothing and its queue is full, is repeated twice before systemd's deadline.
        with contextlib.suppress(OSError):
            if self._socket is None:
                self._connect()
            if self._socket is not None:
                try:
                    self._socket.send(b"WATCHDOG=1", socket.MSG_DONTWAIT)
                except ConnectionError:  # PID 1 has made its socket anew
                    self.close()
                    self._send()

    def _connect(self) -> None:
        """Connects to systemd. Raises OSError."""
        path = os.environ["NOTIFY_SOCKET"]
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            # "@" stands for the first byte of an abstract address.
            made.connect(f"\0{path[1:]}" if path.startswith("@") else path)
        except BaseException:
            made.close()
            raise
        self._socket = made

    async def run(self) -> None:
        """Notifies systemd as long as the event loop runs, until cancelled."""
        while True:
            await asyncio.sleep(self.notify())
