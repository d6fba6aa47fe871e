"""`nbagent`, the operators' command: a client of the control API, and a look at this host."""

from nbagent.cli.commands import main

__all__ = ["main"]
