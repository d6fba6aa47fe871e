# SPDX-License-Identifier: BSD-3-Clause
"""A slot's notebook server, started by exec.

    python3 -I exec_main.py

It inherits the descriptors LISTEN_FD, ACTIVITY_FD and CONFIG_FD of nbagent.sandbox.spec. Python 3.9 and up.
"""

from __future__ import annotations

import gc
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
# Garbage collection is a tenth of a start's processor time, and finds almost nothing because a start creates objects
# that stay.
gc.disable()

from nbagent.sandbox.spec import ACTIVITY_FD, CONFIG_FD, LISTEN_FD
from nbagent.zygote import notebook_server


def main() -> None:
    """Reads the configuration and serves until SIGTERM."""
    for fd in (LISTEN_FD, ACTIVITY_FD, CONFIG_FD):
        os.set_inheritable(fd, False)
    settings = notebook_server.read_settings(CONFIG_FD)
    server = notebook_server.initialise(settings["base_url"], settings["token"])
    notebook_server.serve(server, server.web_app)


if __name__ == "__main__":
    main()
