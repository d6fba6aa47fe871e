# SPDX-License-Identifier: BSD-3-Clause
"""A channel: JSON objects and named descriptors over a SOCK_SEQPACKET unix socket.

One packet is one message. Its field "fds" names the descriptors beside it (SCM_RIGHTS), in their order:

    {"fds": ["init"], ...}

A sent descriptor stays the sender's. A received one belongs to its Message, which closes it unless `take` has passed
it on. A body of more than PACKET_MAX_BYTES travels in a sealed memfd, the descriptor "body" of an otherwise empty
message. Whatever the peer sends, `receive` either returns a Message or raises MalformedMessage with every descriptor
closed. The asyncio side is nbagent.wire.aio.

Standard library only, and little of it, because it is memory of every slot; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from typing import Callable, Dict, List, Mapping, NoReturn, Optional, Tuple

from nbagent.wire import fields, memfd
from nbagent.wire.failure import Failure, StepFailed
from nbagent.wire.fields import MalformedMessage

# Below net.core.wmem_default (212,992 bytes on every Debian kernel), beyond which send fails with EMSGSIZE.
PACKET_MAX_BYTES = 65536
FDS_MAX = 16
_BODY = "body"
# Made once, because json.dumps makes a new one for each call that has separators.
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_NO_FDS: Mapping[str, int] = {}
# CMSG_LEN, because CMSG_SPACE pads to 8 bytes and so leaves room for one descriptor more.
_ANCILLARY_BYTES = socket.CMSG_LEN(FDS_MAX * 4)
_CREDENTIALS = struct.Struct("3i")


class Message:
    """A received object, and the descriptors beside it. Owns those that are not taken; leaving the context closes them.

    `fds` may be read for a descriptor that is borrowed while the context lasts.
    """

    __slots__ = ("body", "fds")

    def __init__(self, body: Dict[str, object], fds: Dict[str, int]) -> None:
        self.body, self.fds = body, fds

    def __enter__(self) -> Message:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, name: str) -> int:
        """The descriptor `name`, which is the caller's from then on. Raises MalformedMessage when there is none."""
        try:
            return self.fds.pop(name)
        except KeyError:
            raise MalformedMessage(f"no descriptor {name!r}") from None

    def close(self) -> None:
        """Closes the descriptors that were not taken."""
        while self.fds:
            os.close(self.fds.popitem()[1])

    def raise_failure(self) -> None:
        """Raises StepFailed when the message is a failure, and MalformedMessage when that is malformed."""
        if "failure" in self.body:
            raise StepFailed(Failure.restore(self.body))


class Channel:
    """One end. Owns its socket; `limit_bytes` bounds the body of a received message."""

    __slots__ = ("limit_bytes", "socket")

    def __init__(self, end: socket.socket, limit_bytes: int = PACKET_MAX_BYTES) -> None:
        self.socket, self.limit_bytes = end, limit_bytes

    @classmethod
    def from_fd(cls, fd: int, limit_bytes: int = PACKET_MAX_BYTES) -> Channel:
        """The channel of a descriptor, which it owns. No system call: family and type are known."""
        return cls(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd), limit_bytes)

    @classmethod
    def unconnected(cls, limit_bytes: int = PACKET_MAX_BYTES) -> Channel:
        """A channel whose socket has still to be connected."""
        return cls(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), limit_bytes)

    @classmethod
    def pair(cls, limit_bytes: int = PACKET_MAX_BYTES) -> Tuple[Channel, Channel]:
        """Two connected ends."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one, limit_bytes), cls(other, limit_bytes)

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def detach(self) -> int:
        """The descriptor, which is the caller's from then on."""
        return self.socket.detach()

    def peer_uid(self) -> int:
        """The user id of the process that connected, or made the pair (SO_PEERCRED)."""
        return self._peer()[1]

    def peer_pid(self) -> int:
        """The process that connected, or made the pair (SO_PEERCRED)."""
        return self._peer()[0]

    def _peer(self) -> Tuple[int, int, int]:
        credentials = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, gid = _CREDENTIALS.unpack(credentials)
        return pid, uid, gid

    def send(self, body: Mapping[str, object], fds: Mapping[str, int] = _NO_FDS) -> None:
        """Sends one message. Raises OSError when the peer has closed its end, or a non-blocking socket is full."""
        payload = _encode({"fds": list(fds), **body} if fds else body)
        if len(payload) <= PACKET_MAX_BYTES:
            self._send(payload, list(fds.values()))
            return
        large = memfd.create("nbagent-message", [_encode(body)])
        try:
            self._send(_encode({"fds": [*fds, _BODY]}), [*fds.values(), large])
        finally:
            os.close(large)

    def _send(self, payload: bytes, fds: List[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        self.socket.sendmsg([payload], ancillary)

    def receive(self, wait: bool = True) -> Optional[Message]:
        """The next message; None when every process has closed the other end.

        Raises MalformedMessage; TimeoutError after the socket's timeout; BlockingIOError when there is none and `wait`
        is false; OSError.
        """
        how = socket.MSG_CMSG_CLOEXEC | (0 if wait else socket.MSG_DONTWAIT)
        most = min(self.limit_bytes, PACKET_MAX_BYTES)
        try:
            payload, ancillary, flags, _ = self.socket.recvmsg(most, _ANCILLARY_BYTES, how)
        except ConnectionResetError:  # it was closed with messages unread
            return None
        fds = _descriptors(ancillary)
        try:
            if flags & socket.MSG_CTRUNC:
                raise MalformedMessage(f"more than {FDS_MAX} descriptors, or more than this process may open")
            if flags & socket.MSG_TRUNC:
                raise MalformedMessage(f"a packet of more than {most} bytes")
            if payload:
                return self._message(payload, fds)
        except BaseException:
            _close(fds)
            raise
        _close(fds)
        return None

    def _message(self, payload: bytes, fds: List[int]) -> Message:
        body = fields.decode(payload)
        names = fields.texts(body, "fds") if "fds" in body else []
        body.pop("fds", None)
        if len(names) != len(fds) or len(set(names)) != len(names):
            raise MalformedMessage(f"{len(names)} names of descriptors for {len(fds)} descriptors, or a name twice")
        named = dict(zip(names, fds))  # noqa: B905  strict= is of 3.10
        if _BODY in named:
            body = fields.decode(memfd.read(named[_BODY], self.limit_bytes))
            os.close(named.pop(_BODY))
        return Message(body, named)


def report_failure(channel: Channel, step: str, action: Callable[[], object]) -> NoReturn:
    """Runs `action`, which does not return; sends what it raises as a failure of `step`, and ends the process."""
    failure = Failure(step, 0, "returned")
    try:
        action()
    except BaseException as error:  # the process ends here, so nothing else could report it
        failure = Failure.of(error, step)
    with contextlib.suppress(OSError):
        channel.send(failure.save())
    os._exit(1)


def _encode(body: Mapping[str, object]) -> bytes:
    return _ENCODER.encode(body).encode()


def _descriptors(ancillary: List[Tuple[int, int, bytes]]) -> List[int]:
    fds: List[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += struct.unpack_from(f"{len(data) // 4}i", data)
    return fds


def _close(fds: List[int]) -> None:
    for fd in fds:
        os.close(fd)
