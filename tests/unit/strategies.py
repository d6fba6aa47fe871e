# SPDX-License-Identifier: BSD-3-Clause
"""Arbitrary input of a peer, for hypothesis: documents, packets, descriptors, and how the connection ends."""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from hypothesis import strategies as st

from nbagent.wire import memfd
from nbagent.wire.channel import FDS_MAX, PACKET_MAX_BYTES

numbers = st.one_of(
    st.integers(-5, 5), st.sampled_from([2**31, 2**63, -2**63, 2**64, 10**400, -1]),
    st.floats(allow_nan=True, allow_infinity=True),
)
# Lone surrogates are valid in JSON and have no encoding; the others are what terminals, paths and logs treat specially.
texts = st.one_of(
    st.sampled_from(["", "\0", "\n<0>x", "..", "/", "../x", "\ud800", "x" * 300, "\x1b[2J", "é" * 200, "nan"]),
    st.text(st.characters(max_codepoint=0x2FF), max_size=8),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def documents(draw: Any, *valid: dict[str, Any]) -> dict[str, Any]:
    """One of the valid documents, of which a few values, at any depth, are others, are missing, or are new."""
    document = json.loads(json.dumps(draw(st.sampled_from(valid))))
    for _ in range(draw(st.integers(0, 3))):
        place = document
        while isinstance(place, dict) and place:
            key = draw(st.sampled_from(sorted(place)))
            if not isinstance(place[key], dict) or draw(st.booleans()):
                break
            place = place[key]
        if isinstance(place, dict):
            key = draw(st.one_of(st.sampled_from(sorted(place) or ["x"]), texts))
            if draw(st.integers(0, 3)):
                place[key] = draw(values)
            else:
                place.pop(key, None)
    return document


def encoded(document: object) -> bytes:
    """JSON with NaN and Infinity, which the module json accepts."""
    return json.dumps(document).encode()


def payloads(*valid: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """The bytes of a packet: a document, a part of one, or arbitrary bytes."""
    whole = documents(*valid).map(encoded)
    return st.one_of(
        whole, whole, whole,
        st.tuples(whole, st.integers(0, 200)).map(lambda cut: cut[0][:cut[1]]),
        st.binary(max_size=40),
        st.sampled_from([
            b"", b"[" * 60_000, b"1e999", b'"' + b"x" * 60_000, b"{" + b" " * (PACKET_MAX_BYTES + 1), b"[1e999, NaN]",
            b"9" * 5000, b'{"a": ' * 20_000,
        ]),
    )


def _pipe() -> int:
    read, write = os.pipe()
    os.close(write)
    return read


def _memfd(content: bytes, seals: int = 0) -> int:
    fd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _huge() -> int:
    fd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 40)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    return fd


def _reopened(flags: int) -> Callable[[], int]:
    def make() -> int:
        fd = memfd.create("x", [b"{}"])
        try:
            return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
        finally:
            os.close(fd)

    return make


def _socket() -> int:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).detach()


DESCRIPTORS: dict[str, Callable[[], int]] = {
    "pipe": _pipe, "socket": _socket, "directory": lambda: os.open("/", os.O_RDONLY | os.O_CLOEXEC),
    "null": lambda: os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC),
    "eventfd": lambda: os.eventfd(0, os.EFD_CLOEXEC),
    "unsealed": lambda: _memfd(b"{}"), "growing": lambda: _memfd(b"{}", fcntl.F_SEAL_SHRINK),
    "sealed": lambda: memfd.create("x", [b"{}"]), "empty": lambda: memfd.create("x", []),
    "not JSON": lambda: memfd.create("x", [b"\xff" * 300]), "huge": _huge,
    "only for writing": _reopened(os.O_WRONLY), "only a path": _reopened(os.O_PATH),
}
ENDS = ("close", "keep", "shutdown")


class Packet(NamedTuple):
    """Bytes, the kinds of the descriptors beside them, and the names of these in the document, if it is one."""

    payload: bytes
    kinds: tuple[str, ...]
    names: tuple[str, ...] | None

    def __repr__(self) -> str:
        shown = self.payload if len(self.payload) <= 300 else self.payload[:300] + b"..."
        return f"Packet({shown!r}, {self.kinds}, {self.names})"

    def send(self, peer: socket.socket) -> None:
        """Sends it, unless the peer has closed its end or the packet is too large for the socket."""
        payload = self.payload
        if self.names is not None and payload.startswith(b"{") and payload.endswith(b"}"):
            fds = b'{"fds": ' + encoded(list(self.names)) + (b"" if payload == b"{}" else b", ")
            payload = fds + payload[1:]
        with contextlib.ExitStack() as stack:
            fds_open = []
            for kind in self.kinds:
                fd = DESCRIPTORS[kind]()
                stack.callback(os.close, fd)
                fds_open.append(fd)
            # Without socket.send_fds, whose flags have no effect in Python 3.11.
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds_open))] if fds_open else []
            with contextlib.suppress(OSError):
                peer.sendmsg([payload], rights, socket.MSG_DONTWAIT)


def packets(payload: st.SearchStrategy[bytes], *names: str) -> st.SearchStrategy[Packet]:
    """Packets whose descriptors often have the names that the protocol expects."""
    kinds = st.one_of(
        st.just(()), st.just(()), st.lists(st.sampled_from(sorted(DESCRIPTORS)), max_size=3).map(tuple),
        st.just(("null",) * (FDS_MAX + 1)),
    )
    name = st.sampled_from(["body", "x", *names])
    return kinds.flatmap(lambda chosen: st.builds(
        Packet, payload, st.just(chosen),
        st.none() if not chosen else st.one_of(
            st.tuples(*[name] * len(chosen)), st.lists(name, max_size=3).map(tuple), st.none()),
    ))


@contextlib.contextmanager
def ended(peer: socket.socket, end: str) -> Iterator[None]:
    """Ends the peer's side by one of ENDS, before the receiver reads: what was sent stays readable."""
    if end == "close":
        peer.close()
    elif end == "shutdown":
        peer.shutdown(socket.SHUT_WR)
    yield
