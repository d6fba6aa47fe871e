# SPDX-License-Identifier: BSD-3-Clause
"""The decoders of untrusted bytes as functions of bytes, for `make fuzz` and for the test that replays tests/corpus.

Each returns whatever the bytes are, or raises what a caller of the decoder would not expect. SEEDS are documents from
which the fuzzer begins.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
from nbagent.content.beneath_writer import BeneathWriter
from nbagent.content.unpack import UnpackLimits, unpack
from nbagent.core.claim_content import Content
from nbagent.core.errors import BadRequest, ImageInvalid, NbagentError
from nbagent.image import archive, manifest, oci
from nbagent.network import requests
from nbagent.supervisor import content_injector
from nbagent.untrusted import tar
from nbagent.untrusted.refusal import Refused
from nbagent.wire import fields, operations
from nbagent.wire.channel import PACKET_MAX_BYTES, Channel, Message
from nbagent.wire.failure import Failure
from nbagent.wire.fields import MalformedMessage

LIMIT_BYTES, LIMIT_ENTRIES = 1 << 18, 50
_SHM = "/dev/shm"


def with_checksums(data: bytes) -> bytes:
    """`data`, in which every block that looks like a header of tar has its checksum.

    Without it a fuzzer that changes a byte of a header changes nothing but the checksum's result.
    """
    blocks = bytearray(data)
    for start in range(0, len(blocks) - hostile.BLOCK + 1, hostile.BLOCK):
        if blocks[start + 257:start + 262] == b"ustar":
            blocks[start + 148:start + 156] = b"        "
            blocks[start + 148:start + 156] = b"%06o\0 " % sum(blocks[start:start + hostile.BLOCK])
    return bytes(blocks)


def fuzz_tar(data: bytes) -> None:
    budget = tar.Budget(LIMIT_BYTES, LIMIT_ENTRIES)
    stream = tar.MeteredReader(io.BytesIO(with_checksums(data)), LIMIT_BYTES)
    written = entries = 0
    try:
        for entry in tar.entries(stream, budget):
            entries += 1
            if ".." in entry.parts or any("/" in part or "\0" in part or not part for part in entry.parts):
                raise AssertionError(f"a name that leads out: {entry.parts}")
            if not 0 <= entry.mtime_s < 1 << 32 or not 0 <= entry.mode < 1 << 12:
                raise AssertionError(f"values out of bounds: {entry.mtime_s}, {entry.mode}")
            if entry.kind is tar.Kind.FILE:
                for chunk in entry.chunks():
                    written += len(chunk)
    except Refused as error:
        _check_text(error)
    if written > LIMIT_BYTES or entries > LIMIT_ENTRIES:
        raise AssertionError(f"{written} bytes and {entries} entries, more than the limits")


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    top = Path(tempfile.mkdtemp(prefix=f"nbagent-fuzz-{os.getpid()}-", dir=_SHM))
    try:
        (top / "root").mkdir()
        yield top / "root"
        found = [path.lstat() for path in (top / "root").rglob("*")]
        size = sum(status.st_size for status in found if stat.S_ISREG(status.st_mode) and status.st_nlink == 1)
        if size > LIMIT_BYTES or len(found) > LIMIT_ENTRIES * tar.DEPTH_MAX or os.listdir(top) != ["root"]:
            raise AssertionError(f"{size} bytes in {len(found)} files, beside {os.listdir(top)}")
    finally:
        shutil.rmtree(top)


def fuzz_content(data: bytes) -> None:
    with _directory() as root, BeneathWriter(str(root)) as home:
        try:
            unpack(io.BytesIO(with_checksums(data)), home, UnpackLimits(LIMIT_BYTES, LIMIT_ENTRIES))
        except Refused as error:
            _check_text(error)


def fuzz_layers(data: bytes) -> None:
    """Two layers, which are the halves of the data in whole blocks."""
    half = len(data) // hostile.BLOCK // 2 * hostile.BLOCK
    fds = []
    with _directory() as root, contextlib.ExitStack() as stack:
        for part in (data[:half] + hostile.END, data[half:]):
            fds.append(os.memfd_create("nbagent-fuzz", os.MFD_CLOEXEC))
            stack.callback(os.close, fds[-1])
            os.write(fds[-1], with_checksums(part))
        limits = archive.ImageArchiveLimits(LIMIT_BYTES, LIMIT_ENTRIES)
        try:
            archive.extract_layers(fds, root, 0, limits, _no_chown)
        except ImageInvalid as error:
            _check_text(error)


def _no_chown(path: str, uid: int, gid: int, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> None:
    pass


class _Blobs(oci.Layout):
    """A layout whose documents are the parts of the data, in the order in which they are read."""

    def __init__(self, documents: list[bytes]) -> None:
        self.path, self.tag, self._opened, self._left = Path("layout"), None, [], documents

    def _open(self, parts: tuple[str, ...]) -> Any:
        return io.BytesIO(self._left.pop(0) if self._left else b"")

    def _document(self, digest: str) -> Any:
        return oci._parse(self._left.pop(0) if self._left else b"", f"blob {digest}")


def fuzz_oci(data: bytes) -> None:
    layout = _Blobs(data.split(b"\n"))
    with _directory() as root:
        try:
            image = layout.image()
            (root / "etc").mkdir()
            (root / "etc/passwd").write_bytes(b"\n".join(layout._left)[:1000])
            _check_manifest(oci.manifest_of(image.config, root))
        except ImageInvalid as error:
            _check_text(error)


def fuzz_manifest(data: bytes) -> None:
    try:
        _check_manifest(manifest.parse(data))
    except ImageInvalid as error:
        _check_text(error)


def _check_manifest(found: manifest.Manifest) -> None:
    saved = json.loads(json.dumps(manifest.to_mapping(found)))
    if manifest.from_mapping(saved) != found:
        raise AssertionError(f"{saved} is not the manifest that was saved")
    for text in (*found.command, *found.environment.values(), found.home, found.directory):
        if b"\0" in os.fsencode(text):
            raise AssertionError(f"{text!r} has NUL")


def _check_text(error: Exception) -> None:
    text = str(error)
    if not text or len(text) > 3000:
        raise AssertionError(f"a message of {len(text)} characters") from error
    text.encode()


def fuzz_channel(data: bytes) -> None:
    """Packets, separated by newlines, to the channel and to each user of its messages."""
    one, other = Channel.pair(1 << 20)
    with one, other:
        for packet in data.split(b"\n")[:5]:
            with contextlib.suppress(BlockingIOError):
                other.socket.send(packet[:PACKET_MAX_BYTES + 10], socket.MSG_DONTWAIT)
        other.close()
        for _ in range(6):
            try:
                message = one.receive(wait=False)
            except MalformedMessage as error:
                _check_text(error)
                continue
            if message is None:
                break
            with message:
                _use(message)


def _use(message: Message) -> None:
    with contextlib.suppress(MalformedMessage):
        Failure.restore(message.body)
    with contextlib.suppress(NbagentError, MalformedMessage, content_injector.StepFailed):
        content_injector._injected(message)
    args = message.body.get("args")
    if isinstance(args, dict):
        for operation in operations.OPERATIONS:
            with contextlib.suppress(MalformedMessage, BadRequest):
                operation.restore(args, message)
    with contextlib.suppress(ValueError, KeyError):
        requests._do(_Kernel(), message, _Kernel())
    with contextlib.suppress(MalformedMessage):
        fields.integer(message.body, "pid", 1, 1 << 22)
    Content()


class _Kernel:
    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


_MANIFESTS = [
    (b'python = "/usr/bin/python3"\nuser = "jovyan"\nlaunch = "fork"\npreload = ["a.b"]\nshare_memory = false\n'
     b'[environment]\nLANG = "C.UTF-8"\n[static]\n"lab" = "/usr/share/lab"\n'),
    (b'command = ["serve", "--port", "{port}"]\nuser = "a"\nport = 8888\nready = "health"\nurl = "?token={token}"\n'
     b'home = "/home/a"\ndirectory = "/work"\n'),
]
_DIGEST = "sha256:" + "0" * 64
_LAYER = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": _DIGEST, "size": 5}
_INDEX = {"manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": _DIGEST, "annotations": {
    "org.opencontainers.image.ref.name": "latest"}, "platform": {"os": "linux", "architecture": "amd64"}}]}
_IMAGE = {"config": {"digest": _DIGEST}, "layers": [_LAYER, _LAYER]}
_CONFIG = {"os": "linux", "architecture": "amd64", "config": {
    "Env": ["PATH=/usr/bin:/bin", "A=b"], "Cmd": ["a"], "Entrypoint": ["b"], "User": "jovyan:users", "WorkingDir": "/w",
    "ExposedPorts": {"8888/tcp": {}}}}
_PASSWD = b"jovyan:x:1000:100::/home/j:/bin/sh"
_OCI = b"\n".join([*(json.dumps(part).encode() for part in (_INDEX, _IMAGE, _CONFIG)), _PASSWD])
_NESTED = {"manifests": [{"mediaType": "application/vnd.oci.image.index.v1+json", "digest": _DIGEST}]}
_MESSAGES = [
    {"fds": []}, {"failure": {"step": "x", "errno": 5, "text": "x"}}, {"files": 1, "entries": 2}, {"pid": 5},
    {"op": "claim", "args": {"options": {"ttl": 5}, "key": "k", "client": "c", "files": {
        "entries": [["a", 1]], "digest": "0"}}},
    {"op": "update", "args": {"id": "x", "options": {"memory": "1G"}}},
    {"op": "attach", "name": "nb-0123456789ab", "inner": "net0", "addresses": ["10.0.0.2"], "rate": 5},
    {"op": "sweep", "keep": ["nb-0123456789ab"]},
]
_TARS = [document for document, _ in hostile.TARS.values() if len(document) < 20_000]
_TARS += hostile.VALID_TARS.values()
_WHITEOUTS = hostile.file("a/x", b"1") + hostile.file("a/.wh..wh..opq") + hostile.file(".wh.a") + hostile.END

TARGETS: dict[str, Callable[[bytes], None]] = {
    "tar": fuzz_tar, "content": fuzz_content, "layers": fuzz_layers, "oci": fuzz_oci, "manifest": fuzz_manifest,
    "channel": fuzz_channel,
}
SEEDS: dict[str, list[bytes]] = {
    "tar": _TARS,
    "content": [*_TARS, *(document for document, _ in hostile.ZIPS.values() if len(document) < 20_000),
                hostile.zipped(), *(gzip.compress(document) for document in _TARS[:5])],
    "layers": [*_TARS, _WHITEOUTS, _WHITEOUTS * 2],
    "oci": [_OCI, json.dumps(_NESTED).encode() + b"\n" + _OCI],
    "manifest": _MANIFESTS,
    "channel": [json.dumps(message).encode() for message in _MESSAGES],
}
