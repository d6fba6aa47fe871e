# SPDX-License-Identifier: BSD-3-Clause
"""Unpacks an image archive that may be hostile.

Nothing is written outside the given directory, no device is created, no set-user-id bit, capability or other extended
attribute is kept, every owner is shifted into the image's own ids, and the unpacked image stays within
`ImageArchiveLimits`. An archive that would break one of these rules raises ImageInvalid, which names the entry. Devices
and FIFOs below /dev, /proc, /run and /sys are left out instead: tools that make images from running containers pack
/dev/console, and a slot has file systems of its own there.

An image is one archive or several layers: archives that are unpacked over each other. An entry replaces that of a
lower layer, and a name that begins with `.wh.` (a whiteout) removes an entry of the lower layers
(https://github.com/opencontainers/image-spec/blob/main/layer.md). Layers may write through symbolic links, as in
`COPY x /bin/` where /bin is a link. As in containerd's archive.Apply, the directories of an entry's name are resolved
within the image, as after chroot(2) into it; the last part of a name is never followed. In a single archive no link
may be on the way.

The directory must be private to the caller until the function returns. After an error the caller removes its content.

content/unpack.py unpacks users' archives. Both use untrusted/; what is here and not there are owners, modes, times,
layers and the zstd program, which runs on the host only.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from nbagent.core.errors import ImageInvalid
from nbagent.image import ids
from nbagent.image.tree import open_tree
from nbagent.untrusted import tar as tars
from nbagent.untrusted.refusal import Refused, shown
from nbagent.untrusted.tar import Budget, Entry, Kind, MeteredReader, Parts
from nbagent.untrusted.tree import NotInTree, Tree

_CHUNK_BYTES = 1 << 20
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
# Devices and FIFOs below these are left out.
_NOT_OF_IMAGES = {("dev",), ("proc",), ("run",), ("sys",)}
# Errors of system calls that are caused by an entry and not by the host.
_OF_ENTRIES = {errno.EEXIST, errno.EINVAL, errno.EILSEQ, errno.EISDIR, errno.ELOOP, errno.EMLINK, errno.ENAMETOOLONG,
               errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EOVERFLOW}


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


def extract(
    archive_fd: int, root: Path, id_base: int, limits: ImageArchiveLimits, chown: Chown = os.chown
) -> list[str]:
    """Unpack a tar archive, plain or packed by zstd, xz, bzip2 or gzip, into the empty directory `root`.

    Reads `archive_fd` from its beginning and leaves it open. Returns the names that were left out. Raises ImageInvalid.
    """
    with _refused(), open_tree(root) as tree:
        extraction = _Extraction(tree, id_base, limits, chown)
        _read(archive_fd, limits.unpacked_bytes, extraction.written, extraction.add)
        extraction.finish()
        return extraction.left_out


def extract_layers(
    layer_fds: Sequence[int], root: Path, id_base: int, limits: ImageArchiveLimits, chown: Chown = os.chown,
    *, over: bool = False,
) -> list[str]:
    """As `extract`, from the layers of an image, the lowest first; `limits` are for all of them together.

    `over`: `root` has an image already, over which the layers are unpacked. Its files are replaced and never written
    to, because they may be hard links to those of another image.

    Each layer is read twice, because a whiteout concerns the lower layers only, at whatever place in the layer it is.
    """
    with _refused(), open_tree(root) as tree:
        extraction = _Extraction(tree, id_base, limits, chown, layered=True, over=over)
        # The first pass over a layer reads the same entries without writing them.
        skipped = Budget(limits.unpacked_bytes, limits.entries)
        left_bytes = limits.unpacked_bytes
        for layer_fd in layer_fds:
            _read(layer_fd, left_bytes, skipped, extraction.apply_whiteout)
            left_bytes -= _read(layer_fd, left_bytes, extraction.written, extraction.add)
        extraction.finish()
        return extraction.left_out


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except Refused as error:
        raise ImageInvalid(str(error)) from error


def _read(archive_fd: int, limit_bytes: int, budget: Budget, use: Callable[[Entry], None]) -> int:
    """Call `use` with every entry of an archive; the number of bytes that were unpacked."""
    with _decompressed(archive_fd) as content:
        stream = MeteredReader(content, limit_bytes, " when unpacked")
        for entry in tars.entries(stream, budget):
            with _refused_entry(entry):
                use(entry)
    return stream.read_bytes


@contextmanager
def _refused_entry(entry: Entry) -> Iterator[None]:
    """Turns the errors of system calls that an entry has caused into ImageInvalid, which names the entry."""
    try:
        yield
    except NotInTree as error:
        raise ImageInvalid(f"{shown(entry.name)}: {error.filename} is a link or not a directory") from None
    except FileExistsError:
        raise ImageInvalid(f"{shown(entry.name)} is in the archive twice") from None
    except OSError as error:
        if error.errno not in _OF_ENTRIES:
            raise
        if error.errno == errno.ELOOP:
            raise ImageInvalid(f"{shown(entry.name)} leads through too many symbolic links") from None
        raise ImageInvalid(f"{shown(entry.name)}: {error.strerror}") from None


@contextmanager
def _decompressed(archive_fd: int) -> Iterator[IO[bytes]]:
    magic = os.pread(archive_fd, 8, 0)
    os.lseek(archive_fd, 0, os.SEEK_SET)
    if magic.startswith(tars.ZSTD_MAGIC):
        with _zstd(archive_fd) as stream:
            yield stream
        return
    with open(archive_fd, "rb", closefd=False) as plain:
        with tars.refuse_damaged():
            stream = tars.decompressed(plain, magic)
        with stream:
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


class _Directory:
    """A directory of the image, with those below it: their attributes are set at the end.

    Writing into a directory changes its time, and its mode may forbid it. `attributes` are uid, gid, mode and time; a
    directory without an entry of its own has None. A tree, because paths as keys would take gigabytes.
    """

    __slots__ = ("attributes", "below")

    def __init__(self) -> None:
        self.attributes: tuple[int, int, int, int] | None = None
        self.below: dict[str, _Directory] = {}


class _Extraction:
    def __init__(
        self, tree: Tree, id_base: int, limits: ImageArchiveLimits, chown: Chown, *, layered: bool = False,
        over: bool = False,
    ) -> None:
        self._tree, self._id_base, self._chown = tree, id_base, chown
        self._layered, self._over = layered, over
        self.written = Budget(limits.unpacked_bytes, limits.entries)
        self._root = self._directory(())
        self.left_out: list[str] = []

    def apply_whiteout(self, entry: Entry) -> None:
        """Remove what an entry of a layer hides of the lower layers."""
        parts = self._resolved(_check_kind(entry))
        if not parts:
            return
        if not parts[-1].startswith(_WHITEOUT):
            # A layer that replaces a file or link by a directory may have whiteouts in it, which the link must not lead
            # elsewhere.
            if entry.kind is Kind.DIRECTORY and self._tree.blocks_directory(parts):
                self._remove(parts)
            return
        name = parts[-1].removeprefix(_WHITEOUT)
        if parts[-1] != _OPAQUE and (name in ("", ".", "..") or name.startswith(_WHITEOUT)):
            raise ImageInvalid(f"{shown(entry.name)} is a whiteout of an invalid name")
        try:
            if parts[-1] != _OPAQUE:
                self._remove((*parts[:-1], name))
                return
            with os.scandir(self._tree.directory_fd(parts[:-1])) as found:
                below = [item.name for item in found]
            for name in below:
                self._remove((*parts[:-1], name))
        except FileNotFoundError:
            pass  # no lower layer has the directory

    def add(self, entry: Entry) -> None:
        """Unpack an entry."""
        parts = _check_kind(entry)
        if entry.kind is Kind.OTHER:
            self.left_out.append(entry.name)
            return
        if self._layered:
            if any(part.startswith(_WHITEOUT) for part in parts[:-1]):
                raise ImageInvalid(f"{shown(entry.name)} has a whiteout as a directory")
            if parts and parts[-1].startswith(_WHITEOUT):
                return
            parts = self._resolved(parts)
        if not (0 <= entry.uid < ids.COUNT and 0 <= entry.gid < ids.COUNT):
            raise ImageInvalid(
                f"{shown(entry.name)} has the owner {entry.uid}:{entry.gid}; expected ids 0 to {ids.COUNT - 1}"
            )
        if entry.kind is Kind.DIRECTORY:
            self._add_directory(parts, entry)
            return
        if not parts:
            raise ImageInvalid("the root of the archive is not a directory")
        self._create_parent(parts)
        if self._layered:
            self._remove(parts)
        if entry.kind is Kind.FILE:
            self._add_file(entry, parts)
        elif entry.kind is Kind.SYMLINK:
            self._tree.symlink(parts, entry.target)
            self._own(parts[-1], self._tree.directory_fd(parts[:-1]), entry.uid, entry.gid)
        else:
            self._add_hard_link(entry, parts)

    def finish(self) -> None:
        """Set the attributes of the directories, after the last write into them."""
        self._finish((), self._root)

    def _finish(self, parts: Parts, directory: _Directory) -> None:
        for name, below in directory.below.items():
            self._finish((*parts, name), below)
        uid, gid, mode, mtime_s = directory.attributes or (0, 0, 0o755, 0)
        directory_fd = self._tree.directory_fd(parts)
        self._own(".", directory_fd, uid, gid)
        os.fchmod(directory_fd, mode)
        os.utime(directory_fd, (mtime_s, mtime_s))

    def _resolved(self, parts: Parts) -> Parts:
        """The path of an entry of a layer without links on the way."""
        if len(parts) < 2:
            return parts
        try:
            self._tree.directory_fd(parts[:-1])
        except FileNotFoundError:
            return parts  # with no link on the way, which would be NotInTree
        except NotInTree:
            return (*self._tree.resolve(parts[:-1]), parts[-1])
        return parts

    def _remove(self, parts: Parts) -> None:
        self._tree.remove(parts)
        directory = self._root
        for part in parts[:-1]:
            if (below := directory.below.get(part)) is None:
                return
            directory = below
        directory.below.pop(parts[-1], None)

    def _create_parent(self, parts: Parts) -> _Directory:
        """Create the directories above an entry for which the archive has no entries; the innermost one."""
        directory = self._root
        for depth, part in enumerate(parts[:-1], 1):
            if (below := directory.below.get(part)) is None:
                self.written.spend_entry()
                below = directory.below[part] = self._directory(parts[:depth])
            directory = below
        self._tree.directory_fd(parts[:-1], create=True)
        return directory

    def _directory(self, parts: Parts) -> _Directory:
        """A directory without an entry, with the attributes that it has in the image below."""
        directory = _Directory()
        if self._over:
            with suppress(FileNotFoundError):
                status = os.fstat(self._tree.directory_fd(parts))
                owner = status.st_uid - self._id_base, status.st_gid - self._id_base
                directory.attributes = (*owner, stat.S_IMODE(status.st_mode), int(status.st_mtime))
        return directory

    def _add_directory(self, parts: Parts, entry: Entry) -> None:
        directory = self._root
        if parts:
            parent = self._create_parent(parts)
            try:
                self._tree.directory_fd(parts, create=True)
            except NotInTree:
                if not self._layered:
                    raise
                self._remove(parts)
                self._tree.directory_fd(parts, create=True)
            directory = parent.below.setdefault(parts[-1], _Directory())
        directory.attributes = (entry.uid, entry.gid, _mode(entry), entry.mtime_s)

    def _add_file(self, entry: Entry, parts: Parts) -> None:
        file_fd = self._tree.create_file(parts, 0o600)
        with open(file_fd, "wb", buffering=0) as file:
            for chunk in entry.chunks():
                left = memoryview(chunk)
                while left:
                    left = left[file.write(left):]
            self._own(parts[-1], self._tree.directory_fd(parts[:-1]), entry.uid, entry.gid)
            os.fchmod(file_fd, _mode(entry))
            os.utime(file_fd, (entry.mtime_s, entry.mtime_s))

    def _add_hard_link(self, entry: Entry, parts: Parts) -> None:
        source = _parts(entry.target)
        if not source:
            raise ImageInvalid(f"{shown(entry.name)} is a hard link to the root")
        if self._layered:
            source = self._resolved(source)
        what = f"{shown(entry.name)} is a hard link to {shown(entry.target)}"
        try:
            status = os.stat(source[-1], dir_fd=self._tree.directory_fd(source[:-1]), follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                raise ImageInvalid(f"{what}, which is not a file")
            self._tree.hard_link(parts, source)
        except FileNotFoundError:
            raise ImageInvalid(f"{what}, which does not exist") from None

    def _own(self, name: str, parent_fd: int, uid: int, gid: int) -> None:
        self._chown(name, self._id_base + uid, self._id_base + gid, dir_fd=parent_fd, follow_symlinks=False)


def _check_kind(entry: Entry) -> Parts:
    """The components of an entry's name. Raises ImageInvalid for a kind of entry that no image may have."""
    if entry.name.startswith("/"):
        raise ImageInvalid(f"{shown(entry.name)} is an absolute name")
    if entry.kind is Kind.OTHER and entry.parts[:1] not in _NOT_OF_IMAGES:
        raise ImageInvalid(f"{shown(entry.name)} is a device, a FIFO or of an unknown type")
    return entry.parts


def _parts(name: str) -> Parts:
    """The components of a name in the archive. Raises ImageInvalid, Refused for a name that leads out of it."""
    if name.startswith("/"):
        raise ImageInvalid(f"{shown(name)} is an absolute name")
    return tars.name_parts(name)


def _mode(entry: Entry) -> int:
    """Permissions without the set-id bits; the sticky bit is needed on /tmp."""
    return entry.mode & 0o1777
