"""Unpacks a .tar, .tar.gz, .tar.bz2, .tar.xz or .zip of which nobody knows who made it.

By the rules of tarfile's "data" filter, which the Python of Debian 12 does not have: regular files,
directories, and links that stay inside; no device, no owner, no set-id bit; a leading slash is taken off, and
"..", a link that leads out, or anything else makes the archive refused. What it is made of is read from its
first bytes, as a URL need not say. A tar archive goes from the network into files without a copy of its own.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from typing import IO, Any, Iterator, List, NamedTuple, Protocol

from nbagent.content.beneath_writer import BeneathWriter, Parts, Refused

_CHUNK_BYTES = 1 << 16
_TARGET_MAX_BYTES = 4096
_ZIP, _GZIP, _BZIP2, _XZ = b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"
# RecursionError: extended headers upon extended headers. RuntimeError: zipfile on one with a password.
_BROKEN = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError, RecursionError,
    RuntimeError, ValueError,
)


class UnpackLimits(NamedTuple):
    """What an archive may have: bytes, packed as well as unpacked, and entries."""

    size_bytes: int
    entries: int


class Readable(Protocol):
    def read(self, size: int = ..., /) -> bytes: ...


def unpack(source: Readable, home: BeneathWriter, limits: UnpackLimits) -> int:
    """Unpacks an archive below `home` and reads `source` to its end. Returns its entries. Raises Refused."""
    packed = _Metered(source, limits.size_bytes, "")
    stream = io.BufferedReader(packed, _CHUNK_BYTES)
    extraction = _Extraction(home, limits)
    try:
        magic = stream.peek(8)[:8]
        if magic.startswith(_ZIP):
            extraction.zip(stream)
        else:
            extraction.tar(_decompressed(stream, magic))
            # What a checksum of the packed stream says is known at its end.
            _drain(stream)
    except OSError as error:
        # bz2 calls damaged data an OSError without a number.
        raise Refused(f"not a readable archive: {error}" if error.errno is None else str(error)) from error
    except _BROKEN as error:
        raise Refused(f"not a readable archive: {error}") from error
    return extraction.entries


def _decompressed(stream: IO[bytes], magic: bytes) -> Any:
    if magic.startswith(_GZIP):
        return gzip.GzipFile(fileobj=stream)
    if magic.startswith(_BZIP2):
        return bz2.BZ2File(stream)
    if magic.startswith(_XZ):
        return lzma.LZMAFile(stream)
    return stream


def _drain(stream: Readable) -> None:
    while stream.read(_CHUNK_BYTES):
        pass


class _Metered(io.RawIOBase):
    """A stream that may give so many bytes and no more, and knows how many it gave and how many zeros came last."""

    def __init__(self, source: Readable, limit_bytes: int, what: str) -> None:
        self._source, self._limit_bytes, self._what = source, limit_bytes, what
        self.read_bytes = self.zeros_bytes = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        chunk = self._source.read(_CHUNK_BYTES if size < 0 else size)
        self.read_bytes += len(chunk)
        if self.read_bytes > self._limit_bytes:
            raise Refused(f"the archive is larger than {self._limit_bytes} bytes{self._what}")
        content = len(chunk.rstrip(b"\0"))
        self.zeros_bytes = len(chunk) - content + (0 if content else self.zeros_bytes)
        return chunk

    def readinto(self, buffer: Any, /) -> int:
        chunk = self.read(len(buffer))
        buffer[:len(chunk)] = chunk
        return len(chunk)


class _Extraction:
    def __init__(self, home: BeneathWriter, limits: UnpackLimits) -> None:
        self._home, self._limits = home, limits
        self.entries = 0
        self._left_bytes = limits.size_bytes

    def tar(self, source: Readable) -> None:
        # Headers count too: tarfile takes extended ones into memory whole, whatever size they claim.
        stream = _Metered(source, self._limits.size_bytes, " when unpacked")
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_CHUNK_BYTES) as tar:
            while (info := tar.next()) is not None:
                # It would remember every entry.
                tar.members.clear()  # type: ignore[attr-defined]
                self._tar_entry(tar, info)
            end = tar.offset
            _drain(stream)
        # tarfile takes any damaged header for the end. At the real end there is nothing but zeros.
        if stream.read_bytes < end + tarfile.BLOCKSIZE or stream.zeros_bytes < stream.read_bytes - end:
            raise Refused("not a readable archive: it is damaged or ends too early")

    def _tar_entry(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        parts = self._next(info.name)
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
        elif info.islnk() and (source := _parts(info.linkname)):
            self._home.hard_link(parts, source)
        else:
            raise Refused(f"{info.name!r} is neither file, directory nor link")

    def zip(self, stream: Readable) -> None:
        # Its list of entries is at its end, so all of it has to be there. In memory as the slot's other files.
        with tempfile.TemporaryFile(dir="/tmp") as copy:
            shutil.copyfileobj(stream, copy, _CHUNK_BYTES)
            with zipfile.ZipFile(copy) as archive:
                for info in archive.infolist():
                    self._zip_entry(archive, info)

    def _zip_entry(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        parts, mode = self._next(info.filename), info.external_attr >> 16
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

    def _next(self, name: str) -> Parts:
        self.entries += 1
        if self.entries > self._limits.entries:
            raise Refused(f"the archive has more than {self._limits.entries} entries")
        return _parts(name)

    def _chunks(self, content: IO[bytes]) -> Iterator[bytes]:
        # What is written counts, not what is read: of a sparse file the archive has little.
        while chunk := content.read(_CHUNK_BYTES):
            self._left_bytes -= len(chunk)
            if self._left_bytes < 0:
                raise Refused(f"the archive is larger than {self._limits.size_bytes} bytes when unpacked")
            yield chunk


def _parts(name: str) -> Parts:
    """The components of a name in the archive. Raises Refused for one that points out of it."""
    parts: List[str] = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise Refused(f'{name!r} has ".." or NUL in it')
    return tuple(parts)
