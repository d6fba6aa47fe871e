# SPDX-License-Identifier: BSD-3-Clause
"""A slot's notebook server, started by exec.

    python3 exec_main.py

It inherits the descriptors LISTEN_FD, ACTIVITY_FD and CONFIG_FD of nbagent.sandbox.spec. Python 3.9 and up.
"""

from __future__ import annotations

import gc
import os
import sys

# Without -I, because the server's path and flags are those of any JupyterLab of the image. The directory of this file,
# whose modules are submodules, is not searched.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [os.path.dirname(os.path.dirname(_HERE)), *(path for path in sys.path if path != _HERE)]
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
