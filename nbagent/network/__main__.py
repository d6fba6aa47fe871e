# SPDX-License-Identifier: BSD-3-Clause
"""The network service: the slots' interfaces and firewall rules. Only this process has CAP_NET_ADMIN.

    python3 -I -m nbagent.network            as nbagent-network.service, with a listening socket from systemd
    python3 -I -m nbagent.network --remove   removes all interfaces and rules, when the package is removed

nbagent.network.requests describes the requests. The service keeps no state: after it was killed, the next request or
systemd starts it again, and the slots' connections go on. It restores what other programs change on the host, when the
kernel notifies it (nbagent.network.watch).
"""

from __future__ import annotations

import json
import math
import selectors
import socket
import sys
import time

from pyroute2 import NetlinkError
from systemd import daemon

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


def main() -> None:
    """Serves until SIGTERM."""
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
        if RULES_PATH.exists():
            _apply(kernel)
        daemon.notify("READY=1")
        changes, due_s, repaired_s, watchdog = watch.Changes(), 0.0, 0.0, Watchdog()
        while True:
            wait_s = max(0.0, due_s - time.monotonic()) if changes else math.inf
            for key, _ in selector.select(min(wait_s, watchdog.notify())):
                if key.fileobj is listener:
                    if (connection := accept_now(listener)) is not None:
                        requests.serve(kernel, connection, lambda: _apply(kernel))
                    continue
                due_s = due_s if changes else max(time.monotonic() + SETTLE_S, repaired_s + INTERVAL_S)
                watch.read(rules_events if key.fileobj is rules_events else state_events, changes)
            if changes.table:  # at once, because packets of slots pass without rules meanwhile
                _restore_table(kernel)
                changes.table = False
            if changes and time.monotonic() >= due_s:
                _repair(kernel, changes)
                changes, repaired_s = watch.Changes(), time.monotonic()


def _restore_table(kernel: HostNetwork) -> None:
    if RULES_PATH.exists() and not kernel.is_applied():
        _apply(kernel)
        emit(Event.NETWORK_RESTORED)


def _repair(kernel: HostNetwork, changes: watch.Changes) -> None:
    try:
        found = kernel.repair(changes)
    except (OSError, NetlinkError) as error:
        emit(Event.NETWORK_FAILED, text=str(error))
        return
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        emit(Event.NETWORK_REPAIRED, text=", ".join(found[:SHOWN]) + more)


def _activated() -> int:
    fds = daemon.listen_fds()
    if len(fds) != 1:
        raise SystemExit("no listening socket from systemd: start nbagent-network.socket")
    return int(fds[0])


def _apply(kernel: HostNetwork) -> None:
    kernel.apply(Rules.restore(json.loads(RULES_PATH.read_text())))
    # Other programs can have made changes while this service did not run.
    _repair(kernel, watch.Changes(everything=True))


if __name__ == "__main__":
    main()
