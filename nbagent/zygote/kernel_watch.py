# SPDX-License-Identifier: BSD-3-Clause
"""Facts about a kernel that its messages show: whether it waits for a person, and which request it executes.

A kernel that waits for input or at a breakpoint is busy by its status, and stays so for ever when its page is gone. The
kernel's manager makes all streams to the kernel, so this reads the messages on them: input_request and input_reply on
the stdin channel, debug_event and status on iopub. Each of them is of Jupyter's protocol, so it works for every kernel.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any, Callable, Dict, List, Optional

# Precedes the signature, the header, the parent's header, the metadata and the content of a message.
DELIMITER = b"<IDS|MSG>"
HEADER, PARENT, CONTENT = 2, 3, 5


class KernelWatch:
    """Facts about one kernel. `changed` is called when `waits` has changed.

    `request` is the header of the last request to execute code that the kernel has begun. `stopped`: a debugger has
    stopped the kernel.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self.request: Dict[str, Any] = {}
        self._changed = changed
        # The request that waits for input, by its id.
        self._asking: Optional[str] = None
        self.stopped = False
        self._executes = False
        # Closed streams of the stdin channel, which are still read, by the identity of their client.
        self._unread: Dict[bytes, Any] = {}

    @property
    def waits(self) -> bool:
        """Whether the kernel waits for a person."""
        return self._asking is not None or self.stopped

    def reset(self) -> None:
        """Forgets the wait, because the kernel was interrupted, restarted or ended."""
        self._set(None, False)

    def ended(self) -> None:
        """Closes what is open, because the kernel has ended or is started again."""
        self._executes = False
        self._close_unread()
        self.reset()

    def iopub(self, stream: Any) -> Any:
        """Reads the messages of a stream of the iopub channel beside its callback; returns it."""
        _read_too(stream, self._read_iopub)
        return stream

    def stdin(self, stream: Any, identity: Optional[bytes]) -> Any:
        """Reads the messages of a stream of the stdin channel beside its callback; returns it.

        When the stream is closed while the kernel executes a request of this client, it stays connected until the
        request ends. Otherwise the kernel's request for input is lost, and the kernel waits without a sign of that.
        """
        on_recv, send_multipart, close = stream.on_recv, stream.send_multipart, stream.close
        _read_too(stream, self._read_stdin)

        def send_and_note(*arguments: Any, **options: Any) -> Any:
            self.reset()
            return send_multipart(*arguments, **options)

        def close_later(linger: Optional[int] = None) -> None:
            if self._executes and identity and self._unread.get(identity) in (None, stream):
                on_recv(self._read_stdin)
                self._unread[identity] = stream
            else:
                close(linger)

        stream.send_multipart, stream.close, stream.close_now = send_and_note, close_later, close
        return stream

    def reopened(self, identity: Optional[bytes]) -> Optional[Any]:
        """The stream of a client that was closed and is still connected; None if there is none.

        A second connection with the same identity would get no message, because zmq's ROUTER refuses it.
        """
        return self._unread.pop(identity, None) if identity else None

    def _close_unread(self) -> None:
        while self._unread:
            self._unread.popitem()[1].close_now()

    def _set(self, asking: Optional[str], stopped: bool) -> None:
        before = self.waits
        self._asking, self.stopped = asking, stopped
        if self.waits != before:
            self._changed()

    def _read_stdin(self, parts: List[bytes]) -> None:
        if _part(parts, HEADER).get("msg_type") == "input_request":
            self._set(str(_part(parts, PARENT).get("msg_id", "")), self.stopped)

    def _read_iopub(self, parts: List[bytes]) -> None:
        # Only these two kinds are parsed, because there may be thousands of others a second.
        if not any(b'"status"' in part or b'"debug_event"' in part for part in parts[:HEADER + 2]):
            return
        kind, content, parent = _part(parts, HEADER).get("msg_type"), _part(parts, CONTENT), _part(parts, PARENT)
        if kind == "debug_event" and content.get("event") in ("stopped", "continued"):
            self._set(self._asking, content["event"] == "stopped")
        elif kind == "status" and parent.get("msg_type") == "execute_request":
            if content.get("execution_state") == "busy":
                self.request, self._executes = parent, True
            elif content.get("execution_state") == "idle":
                self._executes = False
                # The status of a request before the one that waits may be read after its request for input.
                self._set(None if self._asking == parent.get("msg_id") else self._asking, False)
                self._close_unread()


def _read_too(stream: Any, read: Callable[[List[bytes]], None]) -> None:
    """Passes each message of a ZMQStream to `read` before the stream's callback."""
    on_recv = stream.on_recv

    def on_recv_too(callback: Any, *arguments: Any, **options: Any) -> Any:
        if callback is None:
            return on_recv(None, *arguments, **options)

        def read_and_call(parts: List[bytes]) -> Any:
            read(parts)
            return callback(parts)

        return on_recv(read_and_call, *arguments, **options)

    stream.on_recv = on_recv_too


def _part(parts: List[bytes], index: int) -> Dict[str, Any]:
    """A part of a message, by its place after the delimiter; empty if it is malformed."""
    with contextlib.suppress(ValueError, LookupError):
        found = json.loads(parts[parts.index(DELIMITER) + index])
        if isinstance(found, dict):
            return found
    return {}
