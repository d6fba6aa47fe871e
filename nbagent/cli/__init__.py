# SPDX-License-Identifier: BSD-3-Clause
"""`nbagent`, the command for operators: a client of the control API, and tools for this host."""

from nbagent.cli.commands import main

__all__ = ["main"]
