# SPDX-License-Identifier: BSD-3-Clause
"""Unpacks an image archive that may be hostile.

Nothing is written outside the given directory, no symbolic link is followed, no device is created, no set-user-id bit,
capability or other extended attribute is kept, every owner is shifted into the image's own ids, and the unpacked image
stays within `ImageArchiveLimits`. An archive that would break one of these rules raises ImageInvalid, which names the
entry.

An image is one archive or several layers: archives that are unpacked over each other. An entry replaces that of a
lower layer, and a name that begins with `.wh.` (a whiteout) removes an entry of the lower layers
(https://github.com/opencontainers/image-spec/blob/main/layer.md).

The directory must be private to the caller until the function returns. After an error the caller removes its content.

content/unpack.py unpacks users' archives. Both use untrusted/; what is here and not there are owners, modes, times,
layers and the zstd program, which runs on the host only.
"""

from __future__ import annotations

import os
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from nbagent.core.errors import ImageInvalid
from nbagent.image import ids
from nbagent.image.tree import open_tree
from nbagent.untrusted import tar as tars
from nbagent.untrusted.tar import ArchiveRefused, Budget, MeteredReader, Parts
from nbagent.untrusted.tree import NotInTree, Tree

_CHUNK_BYTES = 1 << 20
# Directories are removed by recursion (shutil.rmtree), which Python limits to 1,000 frames.
_DEPTH_MAX = 200
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"


@dataclass(frozen=True)
class ImageArchiveLimits:
    """The bytes after decompression, and the inodes, that an image may occupy on the host."""

    unpacked_bytes: int = 32 << 30
    entries: int = 1_000_000


class Chown(Protocol):
    """os.chown, or a test's replacement for it, because only root may change owners."""

    def __call__(
        self, path: str, uid: int, gid: int, *, dir_fd: int | None = None, follow_symlinks: bool = True
    ) -> None: ...


def extract(archive_fd: int, root: Path, id_base: int, limits: ImageArchiveLimits, chown: Chown = os.chown) -> None:
    """Unpack a tar archive, plain or packed by zstd, xz, bzip2 or gzip, into the empty directory `root`.

    Reads `archive_fd` from its beginning and leaves it open. Raises ImageInvalid.
    """
    with _refused(), open_tree(root) as tree:
        extraction = _Extraction(tree, id_base, limits, chown)
        _read(archive_fd, limits.unpacked_bytes, extraction.add)
        extraction.finish()


def extract_layers(
    layer_fds: Sequence[int], root: Path, id_base: int, limits: ImageArchiveLimits, chown: Chown = os.chown
) -> None:
    """As `extract`, from the layers of an image, the lowest first; `limits` are for all of them together.

    Each layer is read twice, because a whiteout concerns the lower layers only, at whatever place in the layer it is.
    """
    with _refused(), open_tree(root) as tree:
        extraction = _Extraction(tree, id_base, limits, chown, layered=True)
        left_bytes = limits.unpacked_bytes
        for layer_fd in layer_fds:
            _read(layer_fd, left_bytes, extraction.apply_whiteout)
            left_bytes -= _read(layer_fd, left_bytes, extraction.add)
        extraction.finish()


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except ArchiveRefused as error:
        raise ImageInvalid(str(error)) from error


def _read(archive_fd: int, limit_bytes: int, use: Callable[[tarfile.TarFile, tarfile.TarInfo], None]) -> int:
    """Call `use` with every entry of an archive; the number of bytes that were unpacked."""
    with tars.refuse_damaged(), _decompressed(archive_fd) as content:
        stream = MeteredReader(content, limit_bytes, " when unpacked")
        for tar, info in tars.entries(stream):
            use(tar, info)
    return stream.read_bytes


@contextmanager
def _decompressed(archive_fd: int) -> Iterator[IO[bytes]]:
    magic = os.pread(archive_fd, 8, 0)
    os.lseek(archive_fd, 0, os.SEEK_SET)
    if magic.startswith(tars.ZSTD_MAGIC):
        with _zstd(archive_fd) as stream:
            yield stream
        return
    with open(archive_fd, "rb", closefd=False) as plain, tars.decompressed(plain, magic) as stream:
        yield stream


@contextmanager
def _zstd(archive_fd: int) -> Iterator[IO[bytes]]:
    """The output of the zstd program, which runs in parallel with the unpacking."""
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
            "the archive is packed by zstd, and this host has no zstd program; run: apt install zstd"
        ) from None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        yield process.stdout
        process.stdout.close()
        message = process.stderr.read(2000).decode(errors="replace").strip()
        if process.wait() != 0:
            raise ImageInvalid(
                f"not a readable archive: {message or f'zstd ended with status {process.returncode}'}"
            )
    finally:
        process.stdout.close()
        process.stderr.close()
        if process.poll() is None:
            process.kill()
            process.wait()


class _Extraction:
    def __init__(
        self, tree: Tree, id_base: int, limits: ImageArchiveLimits, chown: Chown, *, layered: bool = False
    ) -> None:
        self._tree, self._id_base, self._limits, self._chown = tree, id_base, limits, chown
        self._layered = layered
        self._written = Budget(limits.unpacked_bytes, limits.entries)
        # The first pass over a layer reads the same files without writing them.
        self._skipped = Budget(limits.unpacked_bytes, limits.entries)
        # Attributes of directories are set at the end, because writing into one changes its time, and its mode may
        # forbid it.
        self._directories: dict[Parts, tarfile.TarInfo | None] = {}

    def apply_whiteout(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        """Remove what an entry of a layer hides of the lower layers."""
        parts = _check_kind(info)
        if info.isreg():
            self._skipped.spend_bytes(info.size)
            content = tar.extractfile(info)
            assert content is not None
            while content.read(_CHUNK_BYTES):
                pass
        if not parts or not parts[-1].startswith(_WHITEOUT):
            return
        self._written.spend_entry()
        name = parts[-1].removeprefix(_WHITEOUT)
        if parts[-1] != _OPAQUE and (name in ("", ".", "..") or name.startswith(_WHITEOUT)):
            raise ImageInvalid(f"{info.name!r} is a whiteout of an invalid name")
        try:
            if parts[-1] != _OPAQUE:
                self._remove((*parts[:-1], name))
                return
            with os.scandir(self._tree.directory_fd(parts[:-1])) as found:
                below = [entry.name for entry in found]
            for name in below:
                self._remove((*parts[:-1], name))
        except FileNotFoundError:
            pass  # no lower layer has the directory
        except NotInTree as error:
            raise _not_in_tree(info, error) from None

    def add(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        """Unpack an entry."""
        parts = _check_kind(info)
        if self._layered:
            if any(part.startswith(_WHITEOUT) for part in parts[:-1]):
                raise ImageInvalid(f"{info.name!r} has a whiteout as a directory")
            if parts and parts[-1].startswith(_WHITEOUT):
                return
        self._written.spend_entry()
        if not (0 <= info.uid < ids.COUNT and 0 <= info.gid < ids.COUNT):
            raise ImageInvalid(
                f"{info.name!r} has the owner {info.uid}:{info.gid}; expected ids 0 to {ids.COUNT - 1}"
            )
        try:
            if info.isdir():
                self._add_directory(parts, info)
                return
            if not parts:
                raise ImageInvalid("the root of the archive is not a directory")
            self._create_parent(parts)
            if self._layered:
                self._remove(parts)
            if info.isreg():
                self._add_file(tar, info, parts)
            elif info.issym():
                self._tree.symlink(parts, info.linkname)
                self._own(parts[-1], self._tree.directory_fd(parts[:-1]), info)
            else:
                self._add_hard_link(info, parts)
        except NotInTree as error:
            raise _not_in_tree(info, error) from None
        except FileExistsError:
            raise ImageInvalid(f"{info.name!r} is in the archive twice") from None
        except (ValueError, UnicodeEncodeError) as error:
            raise ImageInvalid(f"{info.name!r}: {error}") from None

    def finish(self) -> None:
        """Set the attributes of the directories, after the last write into them."""
        self._directories.setdefault((), None)
        for parts in sorted(self._directories, key=len, reverse=True):
            info = self._directories[parts]
            try:
                directory_fd = self._tree.directory_fd(parts)
            except (FileNotFoundError, NotInTree):
                if not self._layered:
                    raise
                continue  # a later layer removed a directory above it
            self._own(".", directory_fd, info)
            os.fchmod(directory_fd, _mode(info) if info else 0o755)
            os.utime(directory_fd, _times(info))

    def _remove(self, parts: Parts) -> None:
        self._tree.remove(parts)
        self._directories.pop(parts, None)

    def _create_parent(self, parts: Parts) -> None:
        """Create the directory of an entry, if the archive has no entry for it."""
        for depth in range(len(parts) - 1, 0, -1):
            # With layers a directory may be known and its parent not, because a whiteout removed the parent.
            if parts[:depth] in self._directories:
                if self._layered:
                    continue
                break
            self._written.spend_entry()
            self._directories[parts[:depth]] = None
        self._tree.directory_fd(parts[:-1], create=True)

    def _add_directory(self, parts: Parts, info: tarfile.TarInfo) -> None:
        if parts:
            self._create_parent(parts)
        try:
            self._tree.directory_fd(parts, create=True)
        except NotInTree:
            if not self._layered or not parts:
                raise
            self._remove(parts)
            self._tree.directory_fd(parts, create=True)
        self._directories[parts] = info

    def _add_file(self, tar: tarfile.TarFile, info: tarfile.TarInfo, parts: Parts) -> None:
        content = tar.extractfile(info)
        assert content is not None
        # info.size and not the bytes that are read, because the stream has only a part of a sparse file.
        self._written.spend_bytes(info.size)
        file_fd = self._tree.create_file(parts, 0o600)
        with open(file_fd, "wb", buffering=0) as file:
            while chunk := content.read(_CHUNK_BYTES):
                file.write(chunk)
            self._own(parts[-1], self._tree.directory_fd(parts[:-1]), info)
            os.fchmod(file_fd, _mode(info))
            os.utime(file_fd, _times(info))

    def _add_hard_link(self, info: tarfile.TarInfo, parts: Parts) -> None:
        source = _parts(info.linkname)
        if not source:
            raise ImageInvalid(f"{info.name!r} is a hard link to the root")
        try:
            status = os.stat(source[-1], dir_fd=self._tree.directory_fd(source[:-1]), follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                raise ImageInvalid(f"{info.name!r} is a hard link to {info.linkname!r}, which is not a file")
            self._tree.hard_link(parts, source)
        except FileNotFoundError:
            raise ImageInvalid(f"{info.name!r} is a hard link to {info.linkname!r}, which does not exist") from None

    def _own(self, name: str, parent_fd: int, info: tarfile.TarInfo | None) -> None:
        uid, gid = (info.uid, info.gid) if info else (0, 0)
        self._chown(name, self._id_base + uid, self._id_base + gid, dir_fd=parent_fd, follow_symlinks=False)


def _check_kind(info: tarfile.TarInfo) -> Parts:
    """The components of an entry's name. Raises ImageInvalid for a kind of entry that no image may have."""
    parts = _parts(info.name)
    if not (info.isdir() or info.isreg() or info.issym() or info.islnk()):
        raise ImageInvalid(f"{info.name!r} is a device, a FIFO or of an unknown type")
    return parts


def _not_in_tree(info: tarfile.TarInfo, error: NotInTree) -> ImageInvalid:
    return ImageInvalid(f"{info.name!r}: {error.filename} is a link or not a directory")


def _parts(name: str) -> Parts:
    """The components of a name in the archive. Raises ImageInvalid, ArchiveRefused for a name that leads out of it."""
    if name.startswith("/"):
        raise ImageInvalid(f"{name!r} is an absolute name")
    parts = tars.name_parts(name)
    if len(parts) > _DEPTH_MAX:
        raise ImageInvalid(f"{name[:80]!r}... is more than {_DEPTH_MAX} directories deep")
    return parts


def _times(info: tarfile.TarInfo | None) -> tuple[int, int]:
    """For os.utime: whole seconds in 32 bits, which every file system can store."""
    mtime_s = max(0, min(int(info.mtime), 0xFFFFFFFF)) if info else 0
    return mtime_s, mtime_s


def _mode(info: tarfile.TarInfo) -> int:
    """Permissions without the set-id bits; the sticky bit is needed on /tmp."""
    return info.mode & 0o1777
