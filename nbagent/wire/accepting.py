# SPDX-License-Identifier: BSD-3-Clause
"""accept(2) while descriptors or memory are exhausted. Standard library only; Python 3.9 and up."""

from __future__ import annotations

import errno
import socket
import time
from typing import Optional

# The errors of accept(2) while no descriptor or no memory is left; any other is a fault of the listening socket itself.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
ACCEPT_PAUSE_S = 0.1


def accept_now(listener: socket.socket) -> Optional[socket.socket]:
    """A connection that waits at a socket that does not block. Raises OSError.

    None when there is none, and, after a pause, while no descriptor or memory is left.
    """
    try:
        return listener.accept()[0]
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in EXHAUSTED:
            raise
        time.sleep(ACCEPT_PAUSE_S)
        return None
