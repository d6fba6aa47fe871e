# SPDX-License-Identifier: BSD-3-Clause
"""The launch service's program.

    python3 -I -m nbagent.launch      as nbagent-launch.service, with a listening socket from systemd

nbagent.launch.requests describes the requests. The service keeps no state: after it was killed, the next request
starts it again. Its processes move into the scopes of slots, so that they go on.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess

from systemd import daemon

from nbagent.core import logs
from nbagent.launch import requests
from nbagent.systemd.watchdog import Watchdog
from nbagent.wire.accepting import accept_now


def main() -> None:
    """Serves until SIGTERM."""
    logs.configure()
    # Processes of slots inherit the mask.
    os.umask(0o022)
    listener = socket.socket(fileno=_activated())
    listener.setblocking(False)
    with listener, selectors.DefaultSelector() as selector:
        def spawned(process: subprocess.Popen[bytes]) -> None:
            selector.register(os.pidfd_open(process.pid), selectors.EVENT_READ, process)

        selector.register(listener, selectors.EVENT_READ)
        daemon.notify("READY=1")
        watchdog = Watchdog()
        while True:
            for key, _ in selector.select(watchdog.notify()):
                if key.data is None:
                    if (connection := accept_now(listener)) is not None:
                        requests.serve(connection, spawned)
                else:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    key.data.wait()


def _activated() -> int:
    fds = daemon.listen_fds()
    if len(fds) != 1:
        raise SystemExit("no listening socket from systemd: start nbagent-launch.socket")
    return int(fds[0])


if __name__ == "__main__":
    main()
