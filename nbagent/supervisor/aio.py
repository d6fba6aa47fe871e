"""Waiting for a descriptor in the event loop."""

from nbagent.wire.aio import readable

__all__ = ["readable"]
