# SPDX-License-Identifier: BSD-3-Clause
"""The records of hosts in the DNS: a host publishes its own, and a gateway removes those of hosts that died.

records decides which change follows from the state of a host and from the records that exist; server sends it by RFC
2136 with TSIG. publisher and removal are the loops of nbagent-dns-update.service and nbagent-gateway-dns.service.
"""

from __future__ import annotations

import importlib.util

from nbagent.core.errors import ConfigError


def require_library() -> None:
    """Raises ConfigError without dnspython, which Debian's packages only recommend."""
    if importlib.util.find_spec("dns") is None:
        raise ConfigError("the Python module dns is missing: apt install python3-dnspython")
