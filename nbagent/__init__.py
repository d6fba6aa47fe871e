"""nbagent: notebook slots on one host, as transient systemd scopes.

The package holds no code of its own; `design` of the rooms is in README.md, section Hacking.
"""

__version__ = "0.2.0"
