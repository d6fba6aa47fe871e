"""A slot's notebook server, started by exec.

    python3 -I cold.py

It finds its descriptors by number, as nbagent.sandbox.spec has them. Python 3.9 and up.
"""

from __future__ import annotations

import gc
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
# A start makes objects and no garbage to speak of: looking for it is a tenth of its processor time.
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
