# SPDX-License-Identifier: BSD-3-Clause
"""nbagent: notebook slots on one host, as transient systemd scopes.

The package holds no code of its own; packaging/docs/architecture.md lists its packages.
"""

__version__ = "0.3.0"
