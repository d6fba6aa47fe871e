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
import tarfile
import tempfile
import zipfile
from typing import IO, Iterator, NamedTuple

from nbagent.content.beneath_writer import BeneathWriter, Refused
from nbagent.untrusted import tar as tars
from nbagent.untrusted.tar import ArchiveRefused, Budget, MeteredReader, Parts, Readable

_TARGET_MAX_BYTES = 4096
_ZIP_MAGIC = b"PK\x03\x04"
# RuntimeError: zipfile raises it for an archive with a password.
_DAMAGED = (zipfile.BadZipFile, RuntimeError, ValueError)


class UnpackLimits(NamedTuple):
    """The bytes of an archive, packed as well as unpacked, and its entries."""

    size_bytes: int
    entries: int


def unpack(source: Readable, home: BeneathWriter, limits: UnpackLimits) -> int:
    """Unpacks an archive below `home` and reads `source` to its end. Returns its entries. Raises Refused."""
    stream = io.BufferedReader(MeteredReader(source, limits.size_bytes), tars.CHUNK_BYTES)
    extraction = _Extraction(home, limits)
    with _refused(), tars.refuse_damaged():
        magic = stream.peek(8)[:8]
        if magic.startswith(_ZIP_MAGIC):
            extraction.zip(stream)
        else:
            extraction.tar(tars.decompressed(stream, magic))
            # The checksum of a compressed stream is at its end.
            while stream.read(tars.CHUNK_BYTES):
                pass
    return extraction.budget.spent_entries


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except (ArchiveRefused, OSError) as error:
        raise Refused(str(error)) from error
    except _DAMAGED as error:
        raise Refused(f"not a readable archive: {error}") from error


class _Extraction:
    def __init__(self, home: BeneathWriter, limits: UnpackLimits) -> None:
        self._home, self._limits = home, limits
        self.budget = Budget(limits.size_bytes, limits.entries)

    def tar(self, source: Readable) -> None:
        for tar, info in tars.entries(MeteredReader(source, self._limits.size_bytes, " when unpacked")):
            self._tar_entry(tar, info)

    def _tar_entry(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        parts = self._entry(info.name)
        if info.isdir():
            self._home.make_directory(parts)
        elif not parts:
            raise Refused("the root of the archive is not a directory")
        elif info.isreg():
            content = tar.extractfile(info)
            assert content is not None
            self._home.write(parts, self._chunks(content), bool(info.mode & stat.S_IXUSR))
        elif info.issym():
            self._home.link(parts, info.linkname)
        elif info.islnk() and (source := tars.name_parts(info.linkname)):
            self._home.hard_link(parts, source)
        else:
            raise Refused(f"{info.name!r} is neither file, directory nor link")

    def zip(self, stream: IO[bytes]) -> None:
        # zipfile needs a seekable file, because the list of entries is at the end. /tmp is a tmpfs of the slot.
        with tempfile.TemporaryFile(dir="/tmp") as copy:
            shutil.copyfileobj(stream, copy, tars.CHUNK_BYTES)
            with zipfile.ZipFile(copy) as archive:
                for info in archive.infolist():
                    self._zip_entry(archive, info)

    def _zip_entry(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        parts, mode = self._entry(info.filename), info.external_attr >> 16
        if info.is_dir():
            self._home.make_directory(parts)
        elif not parts:
            raise Refused(f"{info.filename!r} has no name")
        else:
            with archive.open(info) as content:
                if stat.S_ISLNK(mode):
                    self._home.link(parts, content.read(_TARGET_MAX_BYTES).decode())
                else:
                    self._home.write(parts, self._chunks(content), bool(mode & stat.S_IXUSR))

    def _entry(self, name: str) -> Parts:
        self.budget.spend_entry()
        return tars.name_parts(name)

    def _chunks(self, content: IO[bytes]) -> Iterator[bytes]:
        # Count the bytes that are written, because the archive has only a part of a sparse file.
        while chunk := content.read(tars.CHUNK_BYTES):
            self.budget.spend_bytes(len(chunk))
            yield chunk
