# SPDX-License-Identifier: BSD-3-Clause
"""Unpacks an untrusted .tar, .tar.gz, .tar.bz2, .tar.xz or .zip into a slot's home directory.

By the rules of tarfile's "data" filter, which the Python of Debian 12 lacks: regular files, directories, and links that
stay inside; no device, no owner, no set-id bit. A leading slash is removed; "..", a link that leads out, and any other
kind of entry refuse the archive. Its format is detected from its first bytes, because a URL need not end in it. A tar
archive is unpacked while it is received, without a copy of the archive on disk.

image/archive.py unpacks root filesystems. Both use untrusted/; what is here and not there is zip.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import stat
import tempfile
import zipfile
from typing import IO, Iterator, NamedTuple, Optional

from nbagent.content.beneath_writer import BeneathWriter
from nbagent.untrusted import tar as tars
from nbagent.untrusted.refusal import Refused, shown
from nbagent.untrusted.tar import Budget, Entry, Kind, MeteredReader, Readable

_ZIP_MAGIC = b"PK\x03\x04"
# zipfile reads the list of entries into memory as a whole, whatever size it claims.
_LIST_MAX_BYTES = 16 << 20


class UnpackLimits(NamedTuple):
    """The bytes of an archive, packed as well as unpacked, and its entries."""

    size_bytes: int
    entries: int


def unpack(source: Readable, home: BeneathWriter, limits: UnpackLimits) -> int:
    """Unpacks an archive below `home` and reads `source` to its end. Returns its entries. Raises Refused."""
    stream = io.BufferedReader(MeteredReader(source, limits.size_bytes), tars.CHUNK_BYTES)
    extraction = _Extraction(home, limits)
    with _refused():
        with tars.refuse_damaged():
            magic = stream.peek(8)[:8]
        if magic.startswith(_ZIP_MAGIC):
            extraction.zip(stream)
        else:
            with tars.refuse_damaged():
                content = tars.decompressed(stream, magic)
            extraction.tar(content)
            # The checksum of a compressed stream is at its end.
            with tars.refuse_damaged():
                while stream.read(tars.CHUNK_BYTES):
                    pass
    return extraction.budget.spent_entries


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(str(error)) from error


class _BoundedFile(io.BufferedRandom):
    """A file for zipfile: a single read, and a position, which the archive determines, are checked."""

    def seek(self, target: int, whence: int = 0, /) -> int:
        if target < 0 and whence == io.SEEK_SET:
            raise Refused("not a readable archive: its list of entries is not in it")
        return super().seek(target, whence)

    def read(self, size: Optional[int] = -1, /) -> bytes:
        if size is not None and size > _LIST_MAX_BYTES:
            raise Refused(f"the list of entries of the archive is larger than {_LIST_MAX_BYTES} bytes")
        return super().read(size)


class _Extraction:
    def __init__(self, home: BeneathWriter, limits: UnpackLimits) -> None:
        self._home, self._limits = home, limits
        self.budget = Budget(limits.size_bytes, limits.entries)

    def tar(self, source: Readable) -> None:
        for entry in tars.entries(MeteredReader(source, self._limits.size_bytes, " when unpacked"), self.budget):
            self._tar_entry(entry)

    def _tar_entry(self, entry: Entry) -> None:
        parts = entry.parts
        if entry.kind is Kind.DIRECTORY:
            self._home.make_directory(parts)
        elif not parts:
            raise Refused("the root of the archive is not a directory")
        elif entry.kind is Kind.FILE:
            self._home.write(parts, entry.chunks(), bool(entry.mode & stat.S_IXUSR))
        elif entry.kind is Kind.SYMLINK:
            self._home.link(parts, entry.target)
        elif entry.kind is Kind.HARD_LINK and (source := tars.name_parts(entry.target)):
            self._home.hard_link(parts, source)
        else:
            raise Refused(f"{shown(entry.name)} is neither file, directory nor link")

    def zip(self, stream: IO[bytes]) -> None:
        # zipfile needs a seekable file, because the list of entries is at the end. /tmp is a tmpfs of the slot.
        with tempfile.TemporaryFile(dir="/tmp", buffering=0) as plain, _BoundedFile(plain) as copy:
            with tars.refuse_damaged():
                shutil.copyfileobj(stream, copy, tars.CHUNK_BYTES)
                archive = zipfile.ZipFile(copy)
            with archive:
                for info in archive.infolist():
                    self._zip_entry(archive, info)

    def _zip_entry(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        self.budget.spend_entry()
        parts, mode = tars.name_parts(info.filename), info.external_attr >> 16
        if info.filename.endswith("/"):
            self._home.make_directory(parts)
            return
        if not parts:
            raise Refused(f"{shown(info.filename)} has no name")
        with tars.refuse_damaged():
            content = archive.open(info)
        with content:
            if stat.S_ISLNK(mode):
                self._home.link(parts, self._target(info, content))
            else:
                self._home.write(parts, self._chunks(content), bool(mode & stat.S_IXUSR))

    def _target(self, info: zipfile.ZipInfo, content: IO[bytes]) -> str:
        with tars.refuse_damaged():
            target = content.read(tars.PATH_MAX_BYTES + 1).decode()
        tars.check_target(info.filename, target)
        return target

    def _chunks(self, content: IO[bytes]) -> Iterator[bytes]:
        while True:
            with tars.refuse_damaged():
                chunk = content.read(tars.CHUNK_BYTES)
            if not chunk:
                return
            # The sizes in the list of entries are not used, because they need not be those of the content.
            self.budget.spend_bytes(len(chunk))
            yield chunk
