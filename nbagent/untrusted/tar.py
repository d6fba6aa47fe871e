# SPDX-License-Identifier: BSD-3-Clause
"""A reader of tar streams from untrusted sources, bounded in bytes, headers, entries, names, memory and time.

Used by image/archive.py, which writes a root filesystem as root, and by content/unpack.py, which writes into a home
directory as the slot's user. They differ in the entries that they accept and in how they write them; the rest is here:
decompression, names and limits, and the checks that tarfile lacks.

tarfile trusts what a header claims: a negative size, a map of a sparse file whose parts overlap, a time that is
infinite. So a TarInfo does not leave this module. An `Entry` has values that were checked, and its content is counted
when it is written, holes of sparse files included. Whatever tarfile and the decompressors raise for a document becomes
Refused; an OSError with a number is the host's and is raised as it is.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import bz2
import contextlib
import enum
import gzip
import io
import lzma
import math
import os
import tarfile
from typing import IO, Iterator, List, Optional, Protocol, Tuple, cast

from nbagent.untrusted.refusal import Refused, shown

CHUNK_BYTES = 1 << 16
GZIP_MAGIC, BZIP2_MAGIC, XZ_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"

# Directories are removed by recursion (shutil.rmtree), which Python limits to 1,000 frames.
DEPTH_MAX = 100
# NAME_MAX, and PATH_MAX without its final NUL, of the kernel's include/uapi/linux/limits.h.
NAME_MAX_BYTES, PATH_MAX_BYTES = 255, 4095

# tarfile copies the rest of its buffer on each read: a buffer of 1 MiB doubles the time of unpacking.
_TAR_BUFFER_BYTES = 1 << 15
_HEADERS_MAX_BYTES = 1 << 20
# Of all entries together, because tarfile takes 0.2 to 0.4 s for a megabyte. A million entries usually have less.
_ALL_HEADERS_MAX_BYTES = 1 << 30
# tarfile keeps the keys of global headers, and copies them for each entry that has a header of its own.
_GLOBAL_KEYS_MAX, _GLOBAL_MAX_CHARACTERS = 100, 1 << 16
# tarfile concatenates the parts of a sparse file one by one.
_SPARSE_PARTS_MAX = 10_000
# `xz -9` needs 65 MiB. A header of 12 bytes can request 4 GiB.
_XZ_MEMORY_BYTES = 256 << 20
_TIME_MAX_S = 0xFFFFFFFF

Parts = Tuple[str, ...]


class Readable(Protocol):
    def read(self, size: int = ..., /) -> bytes: ...


class MeteredReader(io.RawIOBase):
    """A stream that raises Refused beyond a limit, and counts its bytes and the zeros at its end.

    `allowance_bytes`, unless it is None, is a second limit, which holds until it is set again.
    """

    def __init__(self, source: Readable, limit_bytes: int, state: str = "") -> None:
        self._source, self.limit_bytes, self._state = source, limit_bytes, state
        self.read_bytes = self.trailing_zeros = 0
        self.allowance_bytes: Optional[int] = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        chunk = self._source.read(CHUNK_BYTES if size < 0 else size)
        self.read_bytes += len(chunk)
        self.check(self.read_bytes)
        if self.allowance_bytes is not None:
            self.allowance_bytes -= len(chunk)
            if self.allowance_bytes < 0:
                raise Refused(f"an extended header of the archive is larger than {_HEADERS_MAX_BYTES} bytes")
        content = len(chunk.rstrip(b"\0"))
        self.trailing_zeros = len(chunk) - content + (0 if content else self.trailing_zeros)
        return chunk

    def readinto(self, buffer: object, /) -> int:
        target = cast(memoryview, buffer)
        chunk = self.read(len(target))
        target[:len(chunk)] = chunk
        return len(chunk)

    def check(self, position: int) -> None:
        """Raises Refused when `position` is beyond the limit."""
        if position > self.limit_bytes:
            raise Refused(f"the archive is larger than {self.limit_bytes} bytes{self._state}")

    def drain(self) -> None:
        while self.read():
            pass


class Budget:
    """The bytes, entries and headers that may still be unpacked."""

    def __init__(self, size_bytes: int, entries: int) -> None:
        self._size_bytes, self._entries = size_bytes, entries
        self.spent_bytes = self.spent_entries = self._spent_headers_bytes = 0

    def check_bytes(self, count: int) -> None:
        """Raises Refused when `count` more bytes would be too many."""
        if self.spent_bytes + count > self._size_bytes:
            raise Refused(f"the archive is larger than {self._size_bytes} bytes when unpacked")

    def spend_bytes(self, count: int) -> None:
        self.check_bytes(count)
        self.spent_bytes += count

    def spend_headers(self, count: int) -> None:
        self._spent_headers_bytes += count
        if self._spent_headers_bytes > _ALL_HEADERS_MAX_BYTES:
            raise Refused(f"the headers of the archive are larger than {_ALL_HEADERS_MAX_BYTES} bytes")

    def spend_entry(self) -> None:
        self.spent_entries += 1
        if self.spent_entries > self._entries:
            raise Refused(f"the archive has more than {self._entries} entries")


class Kind(enum.Enum):
    """The kind of an entry. OTHER is a device, a FIFO, or a type that tar does not define."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symbolic link"
    HARD_LINK = "hard link"
    OTHER = "other"


class Entry:
    """One entry of an archive, whose values are checked; valid until the next one is read.

    `target` is that of a link. `mtime_s` is in 32 bits without a sign, which every file system can store.
    """

    __slots__ = ("_budget", "_info", "_tar", "gid", "kind", "mode", "mtime_s", "name", "parts", "target", "uid")

    def __init__(self, tar: tarfile.TarFile, info: tarfile.TarInfo, budget: Budget) -> None:
        self._tar, self._info, self._budget = tar, info, budget
        self.name = info.name
        self.parts = name_parts(info.name)
        self.kind = _kind(info)
        self.target = info.linkname
        if self.kind is Kind.SYMLINK:
            check_target(info.name, info.linkname)
        self.mode, self.uid, self.gid = info.mode & 0o7777, int(info.uid), int(info.gid)
        if not math.isfinite(info.mtime):
            raise Refused(f"{shown(info.name)} has the time {info.mtime}")
        self.mtime_s = max(0, min(int(info.mtime), _TIME_MAX_S))
        if self.kind is Kind.FILE:
            _check_sizes(info)
            budget.check_bytes(info.size)

    def chunks(self) -> Iterator[bytes]:
        """The content of a file, which the caller writes. Each chunk is counted before. Raises Refused."""
        # An exception of the caller between two chunks is not raised here.
        with refuse_damaged():
            content = self._tar.extractfile(self._info)
            if content is None:
                raise Refused(f"{shown(self.name)} has no content")
            while chunk := content.read(CHUNK_BYTES):
                self._budget.spend_bytes(len(chunk))
                yield chunk


def entries(stream: MeteredReader, budget: Budget) -> Iterator[Entry]:
    """The entries of a tar stream; each spends of the budget. At the end the whole stream has been read and checked.

    Raises Refused. An entry's content is read on demand, and skipped unless it is read before the next entry.
    """
    # tarfile reads extended headers into memory as a whole, whatever size they claim; the first ones when it opens.
    stream.allowance_bytes = _HEADERS_MAX_BYTES
    with contextlib.ExitStack() as stack:
        with refuse_damaged():
            tar = stack.enter_context(tarfile.open(fileobj=stream, mode="r|", bufsize=_TAR_BUFFER_BYTES))
        while (entry := _next(tar, stream, budget)) is not None:
            budget.spend_entry()
            stream.allowance_bytes = None
            yield entry
            stream.allowance_bytes = _HEADERS_MAX_BYTES + max(0, tar.offset - stream.read_bytes)
        stream.allowance_bytes = None
        end = tar.offset
        with refuse_damaged():
            stream.drain()
    # tarfile treats a damaged header as the end of the archive. After the real end there are only zeros.
    if stream.read_bytes < end + tarfile.BLOCKSIZE or stream.trailing_zeros < stream.read_bytes - end:
        raise Refused("not a readable archive: it is damaged or ends too early")


def _next(tar: tarfile.TarFile, stream: MeteredReader, budget: Budget) -> Optional[Entry]:
    with refuse_damaged():
        info = tar.next()
        # tarfile keeps every entry: a gigabyte for a million of them.
        tar.members.clear()  # type: ignore[attr-defined]
        # tarfile reads in a loop up to the offset of the next header, also after the end of the stream.
        stream.check(tar.offset)
        keys = tar.pax_headers
        if keys and (len(keys) > _GLOBAL_KEYS_MAX or sum(map(len, keys.values())) > _GLOBAL_MAX_CHARACTERS):
            raise Refused(f"the global headers of the archive are larger than {_GLOBAL_MAX_CHARACTERS} characters")
        if info is None:
            return None
        budget.spend_headers(info.offset_data - info.offset)
        return Entry(tar, info, budget)


def _kind(info: tarfile.TarInfo) -> Kind:
    if info.isreg():
        return Kind.FILE
    if info.isdir():
        return Kind.DIRECTORY
    if info.issym():
        return Kind.SYMLINK
    return Kind.HARD_LINK if info.islnk() else Kind.OTHER


def _check_sizes(info: tarfile.TarInfo) -> None:
    """Raises Refused unless the size is one, and the parts of a sparse file are in order and within it.

    tarfile searches for a position that is in no part for ever.
    """
    parts: List[Tuple[int, int]] = getattr(info, "sparse", None) or []
    end = 0
    for offset, size in parts:
        if offset < end or size < 0:
            raise Refused(f"{shown(info.name)} is a sparse file whose parts are not in order")
        end = offset + size
    if info.size < end or len(parts) > _SPARSE_PARTS_MAX:
        raise Refused(f"{shown(info.name)} has an invalid size, {info.size} bytes in {len(parts)} parts")


class _XzReader(io.RawIOBase):
    """The content of one or several .xz streams. lzma.LZMAFile has no limit of memory."""

    def __init__(self, source: Readable) -> None:
        self._source = source
        self._decompressor = _xz_decompressor()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        wanted = CHUNK_BYTES if size < 0 else size
        while wanted:
            if self._decompressor.eof:
                # Between streams there may be zeros. lzma raises LZMAError for anything else that is not a stream.
                packed = self._decompressor.unused_data.lstrip(b"\0")
                while not packed:
                    if not (packed := self._source.read(CHUNK_BYTES)):
                        return b""
                    packed = packed.lstrip(b"\0")
                self._decompressor = _xz_decompressor()
            elif self._decompressor.needs_input:
                if not (packed := self._source.read(CHUNK_BYTES)):
                    raise EOFError("the compressed data ends too early")
            else:
                packed = b""
            if chunk := self._decompressor.decompress(packed, wanted):
                return chunk
        return b""

    def readinto(self, buffer: object, /) -> int:
        target = cast(memoryview, buffer)
        chunk = self.read(len(target))
        target[:len(chunk)] = chunk
        return len(chunk)


def _xz_decompressor() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)


def decompressed(stream: IO[bytes], magic: bytes) -> IO[bytes]:
    """The content of a stream that begins with `magic`: gzip, bzip2, xz, or the stream itself."""
    if magic.startswith(GZIP_MAGIC):
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    if magic.startswith(BZIP2_MAGIC):
        return cast(IO[bytes], bz2.BZ2File(stream))
    if magic.startswith(XZ_MAGIC):
        return cast(IO[bytes], _XzReader(stream))
    return stream


@contextlib.contextmanager
def refuse_damaged() -> Iterator[None]:
    """Turns whatever a reader of an archive raises into Refused, save an OSError with a number, which is the host's.

    Around calls of tarfile, zipfile and the decompressors only, because for hostile documents they raise more than
    their own errors: ValueError, OverflowError, IndexError, struct.error, RecursionError, MemoryError.
    """
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        # gzip and bz2 raise an OSError without a number for damaged data.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise Refused(f"not a readable archive: {str(error) or type(error).__name__}") from error


def name_parts(name: str) -> Parts:
    """The components of an entry's name. Raises Refused for a name that leads out of the archive, or is too long."""
    parts: List[str] = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise Refused(f'{shown(name)} has ".." or NUL in it')
    if len(parts) > DEPTH_MAX:
        raise Refused(f"{shown(name)} is more than {DEPTH_MAX} directories deep")
    path = _encoded("/".join(parts))
    if len(path) > PATH_MAX_BYTES or max(map(len, path.split(b"/"))) > NAME_MAX_BYTES:
        raise Refused(f"{shown(name)} is longer than {PATH_MAX_BYTES} bytes, or a part of it than {NAME_MAX_BYTES}")
    return tuple(parts)


def check_target(name: str, target: str) -> None:
    """Raises Refused unless `target` can be that of a symbolic link, whose name is `name`."""
    if not target or "\0" in target or len(_encoded(target)) > PATH_MAX_BYTES:
        raise Refused(
            f"{shown(name)} is a symbolic link to {shown(target)}; expected 1 to {PATH_MAX_BYTES} bytes without NUL"
        )


def _encoded(text: str) -> bytes:
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:
        raise Refused(f"{shown(text)} cannot be a file name: it has a character without an encoding") from None
