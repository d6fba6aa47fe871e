# SPDX-License-Identifier: BSD-3-Clause
"""The network service: the slots' interfaces and firewall rules. Only this process has CAP_NET_ADMIN.

    python3 -I -m nbagent.network            as nbagent-network.service, with a listening socket from systemd
    python3 -I -m nbagent.network --remove   removes all interfaces and rules, when the package is removed

nbagent.network.requests describes the requests. The service keeps no state: after it was killed, the next request or
systemd starts it again, and the slots' connections go on.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import sys

from systemd import daemon

from nbagent.core.events import Event, emit
from nbagent.network import requests
from nbagent.network.netlink import HostNetwork, lost_table, watch
from nbagent.network.rules import RULES_PATH, Rules


def main() -> None:
    """Serves until SIGTERM."""
    kernel = HostNetwork()
    if sys.argv[1:] == ["--remove"]:
        kernel.remove_all()
        kernel.close()
        return
    listener = socket.socket(fileno=_activated())
    listener.setblocking(False)
    with listener, watch() as events, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(events, selectors.EVENT_READ)
        if RULES_PATH.exists():
            _apply(kernel)
        daemon.notify("READY=1")
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    with contextlib.suppress(BlockingIOError):
                        requests.serve(kernel, listener.accept()[0], lambda: _apply(kernel))
                elif lost_table(events) and RULES_PATH.exists() and not kernel.is_applied():
                    _apply(kernel)
                    emit(Event.NETWORK_RESTORED)


def _activated() -> int:
    fds = daemon.listen_fds()
    if len(fds) != 1:
        raise SystemExit("no listening socket from systemd: start nbagent-network.socket")
    return int(fds[0])


def _apply(kernel: HostNetwork) -> None:
    kernel.apply(Rules.restore(json.loads(RULES_PATH.read_text())))


if __name__ == "__main__":
    main()
