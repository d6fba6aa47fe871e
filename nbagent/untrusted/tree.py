# SPDX-License-Identifier: BSD-3-Clause
"""A directory tree with untrusted content, in which no path leads out of the tree.

There are two policies for symbolic links on the way. With `follow_links=False` each of them is an error: every
component is opened by openat(2) with O_NOFOLLOW. Images are unpacked this way, because root writes them; `resolve`
computes the path without links that such a path has in the tree. With
`follow_links=True` a link that stays below the tree's root is followed, and one that leads out of it is an error: the
whole path is resolved by openat2(2) with RESOLVE_BENEATH. The content of claims is written this way, because users
have links in their home directories. The last component is never followed when a file is created, removed or read.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
from types import TracebackType
from typing import Dict, Iterator, List, Optional, Type, TypeVar

from nbagent.linux.openat2 import open_beneath
from nbagent.untrusted.refusal import Refused, shown
from nbagent.untrusted.tar import DEPTH_MAX, Parts, name_parts

_Self = TypeVar("_Self", bound="Tree")
# The kernel's limit for links in one path (MAXSYMLINKS).
LINKS_MAX = 40
# Components of all paths that a Tree resolves, of which a million take some seconds.
_RESOLVED_MAX = 10_000_000


class NotInTree(OSError):
    """A component of the path is a link or not a directory, and the tree follows no links."""


def _check(parts: Parts) -> None:
    """Raises NotInTree unless the last component is one name; those before it were checked, or are by openat2(2)."""
    if parts[-1:] in ((), ("",), (".",), ("..",)) or "/" in parts[-1] or "\0" in parts[-1]:
        raise NotInTree(errno.EINVAL, "is not a name", ascii("/".join(parts)))


class Tree:
    """An open directory tree. A context manager.

    Without links to follow, descriptors of directories are cached, so no directory may be renamed or replaced while
    the Tree is open, except by `remove`. `directory_mode` is the mode of the directories that are created.
    """

    _CACHED = 64

    def __init__(self, root: str, *, follow_links: bool, directory_mode: int) -> None:
        self._follow_links, self._directory_mode = follow_links, directory_mode
        # In a home directory there may be directories that its owner may search and not read.
        self._flags = os.O_DIRECTORY | os.O_CLOEXEC | (os.O_PATH if follow_links else os.O_RDONLY | os.O_NOFOLLOW)
        self._resolved = 0
        self._open: Dict[Parts, int] = {(): os.open(root, self._flags)}

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def directory_fd(self, parts: Parts, *, create: bool = False) -> int:
        """Descriptor of a directory. The Tree owns it; it is valid until the next call.

        With `create`, missing directories are created. Raises OSError: NotInTree without links to follow; with them,
        the errno is EXDEV for a link that leads out.
        """
        if self._follow_links:
            self._forget(())  # a link on the way may have been replaced
        if (cached := self._open.get(parts)) is not None:
            return cached
        _check(parts)
        try:
            opened_fd = self._open_directory(parts, create)
        except FileNotFoundError:
            if not create:
                raise
            os.mkdir(parts[-1], self._directory_mode, dir_fd=self.directory_fd(parts[:-1], create=True))
            opened_fd = self._open_directory(parts, create)
        if len(self._open) > self._CACHED:
            oldest = next(cached_parts for cached_parts in self._open if cached_parts)
            os.close(self._open.pop(oldest))
        self._open[parts] = opened_fd
        return opened_fd

    @contextlib.contextmanager
    def directory(self, parts: Parts, *, create: bool = False) -> Iterator[int]:
        """A descriptor as of `directory_fd` that is valid inside the context."""
        fd = os.dup(self.directory_fd(parts, create=create))
        try:
            yield fd
        finally:
            os.close(fd)

    def resolve(self, parts: Parts) -> Parts:
        """The path of a directory without links on the way, as chroot(2) into the tree would resolve it.

        A link's absolute target begins at the root of the tree, and ".." does not lead out of it. Components that do
        not exist are kept, so the result need not exist. For a Tree without links to follow. Raises OSError, Refused.
        """
        found: List[str] = []
        pending, links = list(reversed(parts)), 0
        while pending:
            self._resolved += 1
            if self._resolved > _RESOLVED_MAX or len(pending) > DEPTH_MAX:
                raise Refused(f"{shown('/'.join(parts))} leads through too many symbolic links")
            part = pending.pop()
            if part in ("", "."):
                continue
            if part == "..":
                del found[-1:]
                continue
            try:
                target = os.readlink(part, dir_fd=self.directory_fd(tuple(found)))
            except FileNotFoundError:
                target = ""
            except OSError as error:
                if isinstance(error, NotInTree) or error.errno != errno.EINVAL:  # EINVAL: not a link
                    raise
                target = ""
            if not target:
                found.append(part)
                continue
            links += 1
            if links > LINKS_MAX:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), "/".join(parts))
            if target.startswith("/"):
                found.clear()
            pending += reversed(target.split("/"))
        # A target may have more components than an entry's name.
        return name_parts("/".join(found)) if found else ()

    def create_file(self, parts: Parts, mode: int) -> int:
        """Descriptor, owned by the caller, of a new file that is open for writing. Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(parts[-1], flags, mode, dir_fd=self._parent_fd(parts, create=True))

    def open_file(self, parts: Parts) -> int:
        """Descriptor, owned by the caller, for reading a file that is not a link. A FIFO does not block."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return os.open(parts[-1], flags, dir_fd=self._parent_fd(parts))
        except OSError as error:
            if isinstance(error, NotInTree) or error.errno != errno.ELOOP:
                raise
            raise NotInTree(error.errno, "is a link", "/".join(parts)) from None

    def open_regular(self, parts: Parts) -> Optional[io.BufferedReader]:
        """A file, open for reading; None when it is a directory, a FIFO, a socket or a device. Raises OSError."""
        try:
            fd = self.open_file(parts)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a socket
                return None
            raise
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            return None
        return open(fd, "rb")

    def blocks_directory(self, parts: Parts) -> bool:
        """Whether there is something else than a directory at the path, such as a link."""
        try:
            status = os.stat(parts[-1], dir_fd=self._parent_fd(parts), follow_symlinks=False)
        except FileNotFoundError:
            return False
        return not stat.S_ISDIR(status.st_mode)

    def symlink(self, parts: Parts, target: str) -> None:
        os.symlink(target, parts[-1], dir_fd=self._parent_fd(parts, create=True))

    def hard_link(self, parts: Parts, source: Parts) -> None:
        """Gives a file of the tree a second name."""
        _check(source)
        with self.directory(source[:-1]) as source_fd:
            parent_fd = self._parent_fd(parts, create=True)
            os.link(source[-1], parts[-1], src_dir_fd=source_fd, dst_dir_fd=parent_fd, follow_symlinks=False)

    def remove_file(self, parts: Parts) -> None:
        """Removes a file or link, if there is one. Raises OSError, IsADirectoryError for a directory."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(parts[-1], dir_fd=self._parent_fd(parts))

    def remove(self, parts: Parts) -> None:
        """Removes a file, a link, or a directory with its content, if there is one."""
        try:
            parent_fd = self._parent_fd(parts)
            if not stat.S_ISDIR(os.stat(parts[-1], dir_fd=parent_fd, follow_symlinks=False).st_mode):
                os.unlink(parts[-1], dir_fd=parent_fd)
                return
        except FileNotFoundError:
            return
        self._forget(parts)
        # With dir_fd=, rmtree() works by descriptors and does not follow links.
        shutil.rmtree(parts[-1], dir_fd=self.directory_fd(parts[:-1]))

    def _parent_fd(self, parts: Parts, *, create: bool = False) -> int:
        _check(parts)
        return self.directory_fd(parts[:-1], create=create)

    def _open_directory(self, parts: Parts, create: bool) -> int:
        if self._follow_links:
            return open_beneath(self._open[()], "/".join(parts), self._flags)
        try:
            return os.open(parts[-1], self._flags, dir_fd=self.directory_fd(parts[:-1], create=create))
        except OSError as error:
            if isinstance(error, NotInTree) or error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise NotInTree(error.errno, "is a link or not a directory", "/".join(parts)) from None

    def _forget(self, parts: Parts) -> None:
        for cached in [cached for cached in self._open if cached and cached[: len(parts)] == parts]:
            os.close(self._open.pop(cached))
