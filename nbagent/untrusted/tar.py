# SPDX-License-Identifier: BSD-3-Clause
"""A reader of tar streams from untrusted sources, bounded in bytes, headers and entries.

Used by image/archive.py, which writes a root filesystem as root, and by content/unpack.py, which writes into a home
directory as the slot's user. They differ in the entries that they accept and in how they write them; the rest is here:
decompression, the checks that tarfile lacks, names and limits.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import tarfile
import zlib
from typing import IO, Iterator, List, Optional, Protocol, Tuple, cast

CHUNK_BYTES = 1 << 16
GZIP_MAGIC, BZIP2_MAGIC, XZ_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"

# tarfile copies the rest of its buffer on each read: a buffer of 1 MiB doubles the time of unpacking.
_TAR_BUFFER_BYTES = 1 << 15
_HEADERS_MAX_BYTES = 1 << 20
# RecursionError: tarfile reads an extended header that follows another one by recursion.
_DAMAGED = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, RecursionError)

Parts = Tuple[str, ...]


class ArchiveRefused(Exception):
    """The archive is damaged, too large, or has an entry that may not be unpacked."""


class Readable(Protocol):
    def read(self, size: int = ..., /) -> bytes: ...


class MeteredReader(io.RawIOBase):
    """A stream that raises ArchiveRefused beyond a limit, and counts its bytes and the zeros at its end.

    `allowance_bytes`, unless it is None, is a second limit, which holds until it is set again.
    """

    def __init__(self, source: Readable, limit_bytes: int, state: str = "") -> None:
        self._source, self._limit_bytes, self._state = source, limit_bytes, state
        self.read_bytes = self.trailing_zeros = 0
        self.allowance_bytes: Optional[int] = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        chunk = self._source.read(CHUNK_BYTES if size < 0 else size)
        self.read_bytes += len(chunk)
        if self.read_bytes > self._limit_bytes:
            raise ArchiveRefused(f"the archive is larger than {self._limit_bytes} bytes{self._state}")
        if self.allowance_bytes is not None:
            self.allowance_bytes -= len(chunk)
            if self.allowance_bytes < 0:
                raise ArchiveRefused(f"an extended header of the archive is larger than {_HEADERS_MAX_BYTES} bytes")
        content = len(chunk.rstrip(b"\0"))
        self.trailing_zeros = len(chunk) - content + (0 if content else self.trailing_zeros)
        return chunk

    def readinto(self, buffer: object, /) -> int:
        target = cast(memoryview, buffer)
        chunk = self.read(len(target))
        target[:len(chunk)] = chunk
        return len(chunk)

    def drain(self) -> None:
        while self.read():
            pass


class Budget:
    """The bytes and entries that may still be unpacked."""

    def __init__(self, size_bytes: int, entries: int) -> None:
        self._size_bytes, self._entries = size_bytes, entries
        self.spent_bytes = self.spent_entries = 0

    def spend_bytes(self, count: int) -> None:
        self.spent_bytes += count
        if self.spent_bytes > self._size_bytes:
            raise ArchiveRefused(f"the archive is larger than {self._size_bytes} bytes when unpacked")

    def spend_entry(self) -> None:
        self.spent_entries += 1
        if self.spent_entries > self._entries:
            raise ArchiveRefused(f"the archive has more than {self._entries} entries")


def decompressed(stream: IO[bytes], magic: bytes) -> IO[bytes]:
    """The content of a stream that begins with `magic`: gzip, bzip2, xz, or the stream itself."""
    if magic.startswith(GZIP_MAGIC):
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    if magic.startswith(BZIP2_MAGIC):
        return cast(IO[bytes], bz2.BZ2File(stream))
    if magic.startswith(XZ_MAGIC):
        return cast(IO[bytes], lzma.LZMAFile(stream))
    return stream


def entries(stream: MeteredReader) -> Iterator[Tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The entries of a tar stream, each with the open archive. At the end the whole stream has been read and checked.

    Raises ArchiveRefused; iterate inside `refuse_damaged`, because tarfile reads an entry's content on demand.
    """
    # tarfile reads extended headers into memory as a whole, whatever size they claim; the first ones when it opens.
    stream.allowance_bytes = _HEADERS_MAX_BYTES
    with tarfile.open(fileobj=stream, mode="r|", bufsize=_TAR_BUFFER_BYTES) as tar:
        while (info := tar.next()) is not None:
            # tarfile keeps every entry: a gigabyte for a million of them.
            tar.members.clear()  # type: ignore[attr-defined]
            stream.allowance_bytes = None
            yield tar, info
            stream.allowance_bytes = _HEADERS_MAX_BYTES
        stream.allowance_bytes = None
        end = tar.offset
        stream.drain()
    # tarfile treats a damaged header as the end of the archive. After the real end there are only zeros.
    if stream.read_bytes < end + tarfile.BLOCKSIZE or stream.trailing_zeros < stream.read_bytes - end:
        raise ArchiveRefused("not a readable archive: it is damaged or ends too early")


@contextlib.contextmanager
def refuse_damaged() -> Iterator[None]:
    """Turns the exceptions that tarfile and the decompressors raise for damaged data into ArchiveRefused."""
    try:
        yield
    except _DAMAGED as error:
        raise ArchiveRefused(f"not a readable archive: {error}") from error
    except OSError as error:
        # gzip and bz2 raise an OSError without a number for damaged data.
        if error.errno is not None:
            raise
        raise ArchiveRefused(f"not a readable archive: {error}") from error


def name_parts(name: str) -> Parts:
    """The components of an entry's name. Raises ArchiveRefused for a name that leads out of the archive."""
    parts: List[str] = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise ArchiveRefused(f'{name!r} has ".." or NUL in it')
    return tuple(parts)
