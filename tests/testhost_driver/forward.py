# SPDX-License-Identifier: BSD-3-Clause
"""127.0.0.1:PORT of this machine reaches a host's loopback, through a relay.

The listening socket is created in the machine's network namespace, and the relay that accepts from it runs in the
host's, so that the host sees each connection come from 127.0.0.1.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from testhost_driver import cgroups, launch, netns, processes
from testhost_driver.errors import BadArgument
from testhost_driver.state import Forward, HostState

RELAY = Path(__file__).with_name("relay.py")


def start(host: HostState, host_port: int, machine_port: int) -> Forward:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", machine_port))
        except OSError as error:
            raise BadArgument(
                f"127.0.0.1:{machine_port}: {error.strerror}; give another port as PORT:HOSTPORT"
            ) from None
        listener.listen(4096)
        plan = launch.Plan(
            argv=[sys.executable, "-IS", str(RELAY), str(host_port)],
            log=str(host.directory / "proxy.log"),
            environment={"PATH": os.environ.get("PATH", "/usr/bin:/bin")},
            cgroup_procs=cgroups.join_files(host.name, "helpers"),
            netns=str(netns.path_of(host.name)),
            listen_fd=listener.fileno(),
        )
        proxy = processes.identify(launch.launch(plan))
        if proxy is None:
            raise BadArgument(f"{RELAY} ended at once; see {plan.log}")
        return Forward(host_port, listener.getsockname()[1], proxy)
