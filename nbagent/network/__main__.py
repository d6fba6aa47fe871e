# SPDX-License-Identifier: BSD-3-Clause
"""The network service: the slots' interfaces and firewall rules. Only this process has CAP_NET_ADMIN.

    python3 -I -m nbagent.network            as nbagent-network.service, with a listening socket from systemd
    python3 -I -m nbagent.network --remove   removes all interfaces and rules, when the package is removed

nbagent.network.requests describes the requests. The service keeps no state: after it was killed, the next request or
systemd starts it again, and the slots' connections go on. It restores what other programs change on the host, when the
kernel notifies it (nbagent.network.watch).
"""

from __future__ import annotations

import contextlib
import json
import math
import selectors
import socket
import sys
import time

from pyroute2 import NetlinkError
from systemd import daemon

from nbagent.core import logs
from nbagent.core.events import Event, emit
from nbagent.network import requests, watch
from nbagent.network.netlink import HostNetwork
from nbagent.network.rules import RULES_PATH, Rules
from nbagent.systemd.watchdog import Watchdog
from nbagent.wire.accepting import accept_now

# From the first notification to its check, because one command of an administrator or one start of a slot has many.
SETTLE_S = 0.2
# Between two repairs, so that a program that undoes each of them does not keep a processor busy.
INTERVAL_S = 1.0
# Repaired things named in one journal entry.
SHOWN = 10
FAILURES = (OSError, NetlinkError)


class Upkeep:
    """Keeps the kernel's state as the rules and the slots need it: checks it after notifications, and on request."""

    def __init__(self, kernel: HostNetwork, *events: socket.socket) -> None:
        self._kernel = kernel
        self._events = events
        self._changes = watch.Changes()
        self._noted_s = self._repaired_s = -math.inf
        # Why the last repair was not possible; "" when it was.
        self._failure = ""

    def start(self) -> None:
        """Applies the rules of a former process of this service. A failure is repeated by `repair`."""
        self._changes.table = RULES_PATH.exists()
        with contextlib.suppress(*FAILURES):
            self.apply()

    def apply(self) -> None:
        """Applies the rules, if there are any. Raises OSError or NetlinkError."""
        if RULES_PATH.exists():
            self._kernel.apply(Rules.restore(json.loads(RULES_PATH.read_text())))
            # Other programs can have made changes while this service did not run.
            self._changes.everything = True
            self.repair()

    def check(self) -> None:
        """Repairs all that is known to have changed. Raises OSError while that, or a new slot, is not possible."""
        for events in self._events:
            watch.read(events, self._changes)
        if self._changes or self._kernel.has_stale:
            self.repair()
        if self._failure:
            raise OSError(self._failure)
        self._kernel.check()

    def read(self, events: socket.socket) -> None:
        """Reads notifications."""
        if not self._changes:
            self._noted_s = time.monotonic()
        watch.read(events, self._changes)

    def due_s(self) -> float:
        """When `repair` is due; infinity while nothing is known to have changed."""
        if not self._changes and not self._kernel.has_stale:
            return math.inf
        # The table at once, because packets of slots pass without rules meanwhile.
        settled_s = self._noted_s if self._changes.table else self._noted_s + SETTLE_S
        return max(settled_s, self._repaired_s + INTERVAL_S)

    def repair(self) -> None:
        """Repairs what has changed. Changes whose repair fails are kept for the next time."""
        self._repaired_s = time.monotonic()
        try:
            if self._changes.table and RULES_PATH.exists() and not self._kernel.is_intact():
                self._kernel.apply(Rules.restore(json.loads(RULES_PATH.read_text())))
                emit(Event.NETWORK_RESTORED)
            found = self._kernel.repair(self._changes)
        except FAILURES as error:
            if str(error) != self._failure:
                emit(Event.NETWORK_FAILED, text=str(error))
            self._failure = str(error)
            return
        self._changes, self._failure = watch.Changes(), ""
        if found:
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            emit(Event.NETWORK_REPAIRED, text=", ".join(found[:SHOWN]) + more)


def main() -> None:
    """Serves until SIGTERM."""
    logs.configure()
    kernel = HostNetwork()
    if sys.argv[1:] == ["--remove"]:
        kernel.remove_all()
        kernel.close()
        return
    listener = socket.socket(fileno=_activated())
    listener.setblocking(False)
    rules_events, state_events = watch.rules_socket(), watch.state_socket()
    with listener, rules_events, state_events, selectors.DefaultSelector() as selector:
        for readable in (listener, rules_events, state_events):
            selector.register(readable, selectors.EVENT_READ)
        upkeep, watchdog = Upkeep(kernel, rules_events, state_events), Watchdog()
        upkeep.start()
        daemon.notify("READY=1")
        while True:
            wait_s = max(0.0, upkeep.due_s() - time.monotonic())
            for key, _ in selector.select(min(wait_s, watchdog.notify())):
                if key.fileobj is not listener:
                    upkeep.read(rules_events if key.fileobj is rules_events else state_events)
                elif (connection := accept_now(listener)) is not None:
                    requests.serve(kernel, connection, upkeep)
            if time.monotonic() >= upkeep.due_s():
                upkeep.repair()


def _activated() -> int:
    fds = daemon.listen_fds()
    if len(fds) != 1:
        raise SystemExit("no listening socket from systemd: start nbagent-network.socket")
    return int(fds[0])


if __name__ == "__main__":
    main()
