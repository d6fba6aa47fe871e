"""Unpacks an image archive whose content nobody vouches for.

Promises: nothing is written outside the given directory, no symbolic link is followed, no device is made, no
set-user-id bit, capability or other extended attribute survives, every owner is shifted into the image's own
ids, and what is unpacked stays within `ImageArchiveLimits`.
Whatever would break a promise raises ImageInvalid and names
the entry.

An image comes as one archive, or as layers: archives that are laid over each other, in which an entry replaces
what is below it and a name that begins with `.wh.` takes something of the layers below away
(https://github.com/opencontainers/image-spec/blob/main/layer.md).

The directory has to be private to the caller until this returns. What is left in it after an error is the
caller's to remove.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import stat
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from nbagent.core.errors import ImageInvalid
from nbagent.image import ids
from nbagent.image.tree import NotInTree, Parts, Tree

_CHUNK_BYTES = 1 << 20
# tarfile copies what is left of its buffer on each read: with one of 1 MiB, half the time of unpacking.
_TAR_BUFFER_BYTES = 1 << 15
_HEADERS_MAX_BYTES = 1 << 20
# What is walked by recursion must have an end before Python's.
_DEPTH_MAX = 200
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_ZSTD_MAGIC, _XZ_MAGIC, _GZIP_MAGIC = b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"\x1f\x8b"


@dataclass(frozen=True)
class ImageArchiveLimits:
    """What an image may take on the host: bytes after decompression, and inodes."""

    unpacked_bytes: int = 32 << 30
    entries: int = 1_000_000


class Chown(Protocol):
    """os.chown, or what stands in for it where a test is not root."""

    def __call__(
        self, path: str, uid: int, gid: int, *, dir_fd: int | None = None, follow_symlinks: bool = True
    ) -> None: ...


def extract(archive_fd: int, root: Path, id_base: int, limits: ImageArchiveLimits, chown: Chown = os.chown) -> None:
    """Unpack a tar archive, plain or packed by zstd, xz or gzip, into the empty directory `root`.

    Reads `archive_fd` from its beginning and leaves it open. Raises ImageInvalid.
    """
    with Tree(root) as tree:
        extraction = _Extraction(tree, id_base, limits, chown)
        _read(archive_fd, limits.unpacked_bytes, extraction.add)
        extraction.finish()


def extract_layers(
    layer_fds: Sequence[int], root: Path, id_base: int, limits: ImageArchiveLimits, chown: Chown = os.chown
) -> None:
    """As `extract`, from the layers of an image, the lowest first; `limits` are for all of them together.

    Each layer is read twice: what it takes away is of the layers below it, wherever in the layer that is said.
    """
    with Tree(root) as tree:
        extraction = _Extraction(tree, id_base, limits, chown, layered=True)
        left_bytes = limits.unpacked_bytes
        for layer_fd in layer_fds:
            _read(layer_fd, left_bytes, extraction.take_away)
            left_bytes -= _read(layer_fd, left_bytes, extraction.add)
        extraction.finish()


def _read(archive_fd: int, limit_bytes: int, use: Callable[[tarfile.TarFile, tarfile.TarInfo], None]) -> int:
    """Hand every entry of an archive to `use`; how many bytes it has unpacked. Raises ImageInvalid."""
    try:
        with _decompressed(archive_fd) as packed:
            stream = _Metered(packed, limit_bytes)
            with tarfile.open(fileobj=stream, mode="r|", bufsize=_TAR_BUFFER_BYTES) as tar:
                while (info := _next(tar, stream)) is not None:
                    # It would remember every entry, and a million of them is a gigabyte.
                    tar.members.clear()  # type: ignore[attr-defined]
                    use(tar, info)
                end = tar.offset
                stream.drain()
            # tarfile takes any damaged header for the end. At the real end there is nothing but zeros.
            if stream.read_bytes < end + tarfile.BLOCKSIZE or stream.trailing_zeros < stream.read_bytes - end:
                raise ImageInvalid("not a readable archive: it is damaged or ends too early")
            return stream.read_bytes
    # Python's gzip calls a broken file an OSError; extended headers upon extended headers are a recursion.
    except (
        gzip.BadGzipFile,
        tarfile.TarError,
        EOFError,
        RecursionError,
        zlib.error,
        lzma.LZMAError,
    ) as error:
        raise ImageInvalid(f"not a readable archive: {error}") from error


def _next(tar: tarfile.TarFile, stream: _Metered) -> tarfile.TarInfo | None:
    """The next entry. tarfile takes extended headers into memory whole, whatever size they claim."""
    stream.allowance_bytes = _HEADERS_MAX_BYTES
    try:
        return tar.next()
    finally:
        stream.allowance_bytes = None


@contextmanager
def _decompressed(archive_fd: int) -> Iterator[_Readable]:
    magic = os.pread(archive_fd, 8, 0)
    os.lseek(archive_fd, 0, os.SEEK_SET)
    if magic.startswith(_ZSTD_MAGIC):
        with _zstd(archive_fd) as stream:
            yield stream
        return
    with open(archive_fd, "rb", closefd=False) as plain:
        if magic.startswith(_XZ_MAGIC):
            with lzma.open(plain) as stream:
                yield stream
        elif magic.startswith(_GZIP_MAGIC):
            with gzip.open(plain) as stream:
                yield stream
        else:
            yield plain


@contextmanager
def _zstd(archive_fd: int) -> Iterator[IO[bytes]]:
    """The output of the zstd program; it is a second process, so it runs beside the unpacking."""
    try:
        process = subprocess.Popen(
            ["zstd", "-dcq"],
            stdin=archive_fd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=_CHUNK_BYTES,
        )
    except FileNotFoundError:
        raise ImageInvalid(
            "the archive is packed by zstd, and there is no zstd program on this host"
        ) from None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        yield process.stdout
        process.stdout.close()
        complaint = process.stderr.read(2000).decode(errors="replace").strip()
        if process.wait() != 0:
            raise ImageInvalid(
                f"not a readable archive: {complaint or f'zstd ended with {process.returncode}'}"
            )
    finally:
        process.stdout.close()
        process.stderr.close()
        if process.poll() is None:
            process.kill()
            process.wait()


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Metered(io.RawIOBase):
    """A stream that is read up to a limit and knows how many bytes it gave, and how many zeros came last.

    `allowance_bytes`, where it is not None, is how much may still be read for now.
    """

    def __init__(self, stream: _Readable, limit_bytes: int) -> None:
        self._stream, self._limit_bytes = stream, limit_bytes
        self.read_bytes = 0
        self.trailing_zeros = 0
        # tarfile reads the first header already when it opens the archive.
        self.allowance_bytes: int | None = _HEADERS_MAX_BYTES

    def read(self, size: int = _CHUNK_BYTES, /) -> bytes:
        chunk = self._stream.read(size)
        if self.allowance_bytes is not None:
            self.allowance_bytes -= len(chunk)
            if self.allowance_bytes < 0:
                raise ImageInvalid("the archive has an extended header of an absurd size")
        self.read_bytes += len(chunk)
        if self.read_bytes > self._limit_bytes:
            raise ImageInvalid(f"the archive is larger than {self._limit_bytes} bytes when unpacked")
        content = len(chunk.rstrip(b"\0"))
        self.trailing_zeros = len(chunk) - content + (0 if content else self.trailing_zeros)
        return chunk

    def drain(self) -> None:
        while self.read():
            pass


class _Extraction:
    def __init__(
        self, tree: Tree, id_base: int, limits: ImageArchiveLimits, chown: Chown, *, layered: bool = False
    ) -> None:
        self._tree, self._id_base, self._limits, self._chown = tree, id_base, limits, chown
        self._layered = layered
        self._entries = 0
        self._written_bytes = self._passed_bytes = 0
        # Attributes of directories come last: writing into one changes its time, and a mode may forbid it.
        self._directories: dict[Parts, tarfile.TarInfo | None] = {}

    def take_away(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        """What an entry of a layer takes away of those below."""
        parts = _check_kind(info)
        if info.isreg():
            self._passed_bytes = self._grown(self._passed_bytes, info)
            content = tar.extractfile(info)
            assert content is not None
            while content.read(_CHUNK_BYTES):
                pass
        if not parts or not parts[-1].startswith(_WHITEOUT):
            return
        self._count()
        name = parts[-1].removeprefix(_WHITEOUT)
        if parts[-1] != _OPAQUE and (name in ("", ".", "..") or name.startswith(_WHITEOUT)):
            raise ImageInvalid(f"{info.name!r} takes away what cannot be a name")
        try:
            if parts[-1] != _OPAQUE:
                self._remove((*parts[:-1], name))
                return
            with os.scandir(self._tree.directory_fd(parts[:-1])) as found:
                below = [entry.name for entry in found]
            for name in below:
                self._remove((*parts[:-1], name))
        except FileNotFoundError:
            pass  # nothing below has the directory
        except NotInTree as error:
            raise _not_in_tree(info, error) from None

    def add(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        """Unpack an entry."""
        parts = _check_kind(info)
        if self._layered:
            if any(part.startswith(_WHITEOUT) for part in parts[:-1]):
                raise ImageInvalid(f"{info.name!r} is in something that takes away")
            if parts and parts[-1].startswith(_WHITEOUT):
                return
        self._count()
        if not (0 <= info.uid < ids.COUNT and 0 <= info.gid < ids.COUNT):
            raise ImageInvalid(
                f"{info.name!r}: owner {info.uid}:{info.gid}; an image has ids 0 to {ids.COUNT - 1}"
            )
        try:
            if info.isdir():
                self._add_directory(parts, info)
                return
            if not parts:
                raise ImageInvalid("the root of the archive is not a directory")
            parent_fd = self._parent_fd(parts)
            if self._layered:
                self._remove(parts)
                parent_fd = self._parent_fd(parts)
            if info.isreg():
                self._add_file(tar, info, parts[-1], parent_fd)
            elif info.issym():
                os.symlink(info.linkname, parts[-1], dir_fd=parent_fd)
                self._own(parts[-1], parent_fd, info)
            else:
                self._add_hard_link(info, parts)
        except NotInTree as error:
            raise _not_in_tree(info, error) from None
        except FileExistsError:
            raise ImageInvalid(f"{info.name!r} is in the archive twice") from None
        except (ValueError, UnicodeEncodeError) as error:
            raise ImageInvalid(f"{info.name!r}: {error}") from None

    def finish(self) -> None:
        """Give the directories their attributes, when nothing is written into them any more."""
        self._directories.setdefault((), None)
        for parts in sorted(self._directories, key=len, reverse=True):
            info = self._directories[parts]
            try:
                directory_fd = self._tree.directory_fd(parts)
            except (FileNotFoundError, NotInTree):
                if not self._layered:
                    raise
                continue  # a later layer took a directory above it away
            self._own(".", directory_fd, info)
            os.fchmod(directory_fd, _mode(info) if info else 0o755)
            os.utime(directory_fd, _times(info))

    def _remove(self, parts: Parts) -> None:
        self._tree.remove(parts)
        self._directories.pop(parts, None)

    def _grown(self, before_bytes: int, info: tarfile.TarInfo) -> int:
        # A sparse entry is larger than what the stream has of it.
        if before_bytes + info.size > self._limits.unpacked_bytes:
            raise ImageInvalid(
                f"the archive is larger than {self._limits.unpacked_bytes} bytes when unpacked"
            )
        return before_bytes + info.size

    def _count(self) -> None:
        self._entries += 1
        if self._entries > self._limits.entries:
            raise ImageInvalid(f"the archive has more than {self._limits.entries} entries")

    def _parent_fd(self, parts: Parts) -> int:
        """Descriptor of the directory that holds an entry; one that the archive does not have is made."""
        for depth in range(len(parts) - 1, 0, -1):
            # With layers the one above may be new and this one not: it was there before a whiteout.
            if parts[:depth] in self._directories:
                if self._layered:
                    continue
                break
            self._count()
            self._directories[parts[:depth]] = None
        return self._tree.directory_fd(parts[:-1], create=True)

    def _add_directory(self, parts: Parts, info: tarfile.TarInfo) -> None:
        if parts:
            self._parent_fd(parts)
        try:
            self._tree.directory_fd(parts, create=True)
        except NotInTree:
            if not self._layered or not parts:
                raise
            self._remove(parts)
            self._tree.directory_fd(parts, create=True)
        self._directories[parts] = info

    def _add_file(self, tar: tarfile.TarFile, info: tarfile.TarInfo, name: str, parent_fd: int) -> None:
        content = tar.extractfile(info)
        assert content is not None
        self._written_bytes = self._grown(self._written_bytes, info)
        file_fd = os.open(
            name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent_fd
        )
        with open(file_fd, "wb", buffering=0) as file:
            while chunk := content.read(_CHUNK_BYTES):
                file.write(chunk)
            self._own(name, parent_fd, info)
            os.fchmod(file_fd, _mode(info))
            os.utime(file_fd, _times(info))

    def _add_hard_link(self, info: tarfile.TarInfo, parts: Parts) -> None:
        source = _parts(info.linkname)
        if not source:
            raise ImageInvalid(f"{info.name!r} is a hard link to the root")
        try:
            source_fd = os.dup(self._tree.directory_fd(source[:-1]))
        except FileNotFoundError:
            raise ImageInvalid(
                f"{info.name!r} is a hard link to {info.linkname!r}, which is not there"
            ) from None
        try:
            status = os.stat(source[-1], dir_fd=source_fd, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                raise ImageInvalid(f"{info.name!r} is a hard link to {info.linkname!r}, which is not a file")
            os.link(
                source[-1],
                parts[-1],
                src_dir_fd=source_fd,
                dst_dir_fd=self._parent_fd(parts),
                follow_symlinks=False,
            )
        except FileNotFoundError:
            raise ImageInvalid(
                f"{info.name!r} is a hard link to {info.linkname!r}, which is not there"
            ) from None
        finally:
            os.close(source_fd)

    def _own(self, name: str, parent_fd: int, info: tarfile.TarInfo | None) -> None:
        uid, gid = (info.uid, info.gid) if info else (0, 0)
        self._chown(name, self._id_base + uid, self._id_base + gid, dir_fd=parent_fd, follow_symlinks=False)


def _check_kind(info: tarfile.TarInfo) -> Parts:
    """The components of an entry's name. Raises ImageInvalid for what no image may have."""
    parts = _parts(info.name)
    if not (info.isdir() or info.isreg() or info.issym() or info.islnk()):
        raise ImageInvalid(f"{info.name!r} is a device, FIFO or of a kind nobody knows")
    return parts


def _not_in_tree(info: tarfile.TarInfo, error: NotInTree) -> ImageInvalid:
    return ImageInvalid(f"{info.name!r}: {error.filename} on the way is a link or no directory")


def _parts(name: str) -> Parts:
    """The components of a name in the archive. Raises ImageInvalid for one that points out of it."""
    if name.startswith("/"):
        raise ImageInvalid(f"{name!r} is an absolute name")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise ImageInvalid(f'{name!r} has ".." in it')
    if "\0" in name:
        raise ImageInvalid(f"{name!r} has NUL in it")
    if len(parts) > _DEPTH_MAX:
        raise ImageInvalid(f"{name[:80]!r}... is more than {_DEPTH_MAX} directories deep")
    return parts


def _times(info: tarfile.TarInfo | None) -> tuple[int, int]:
    """For os.utime. Whole seconds that every file system can keep."""
    mtime_s = max(0, min(int(info.mtime), 0xFFFFFFFF)) if info else 0
    return mtime_s, mtime_s


def _mode(info: tarfile.TarInfo) -> int:
    """Permissions without the set-id bits; the sticky bit is needed on /tmp."""
    return info.mode & 0o1777
