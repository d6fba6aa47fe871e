# SPDX-License-Identifier: BSD-3-Clause
"""systemd's watchdog (WatchdogSec=): it ends a service whose loop does not notify it, and starts the service again."""

from __future__ import annotations

import asyncio
import os
import time

from systemd import daemon

# Without a watchdog.
_NEVER_S = 3600.0


class Watchdog:
    """Notifies systemd three times in its interval."""

    def __init__(self) -> None:
        self._interval_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 / 3
        self._next_s = 0.0

    def notify(self) -> float:
        """Notifies systemd when it is due; the seconds until it is due again."""
        if not self._interval_s:
            return _NEVER_S
        if (now_s := time.monotonic()) >= self._next_s:
            daemon.notify("WATCHDOG=1")
            self._next_s = now_s + self._interval_s
        return self._next_s - now_s

    async def run(self) -> None:
        """Notifies systemd as long as the event loop runs, until cancelled."""
        while True:
            await asyncio.sleep(self.notify())
