"""A directory tree in which no name is ever resolved over a symbolic link.

For trees whose content somebody hostile has chosen. Every step is an openat(2) of one name with O_NOFOLLOW,
so a link that the content has put in the way is an error and never a detour to somewhere else on the host.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Parts = tuple[str, ...]


class NotInTree(OSError):
    """Something on the way is a link or not a directory."""


class Tree:
    """Descriptors of a tree's directories, opened on demand and closed with the context.

    Directories are remembered, so none of them may be renamed or replaced while a Tree is open but by `remove`.
    """

    _REMEMBERED = 64

    def __init__(self, root: Path) -> None:
        self._open: dict[Parts, int] = {(): os.open(root, _DIRECTORY)}

    def __enter__(self) -> Tree:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes every descriptor."""
        while self._open:
            os.close(self._open.popitem()[1])

    def directory_fd(self, parts: Sequence[str], *, create: bool = False) -> int:
        """Descriptor of a directory. It stays the tree's, and is good until the next call.

        With `create`, missing ones are made with mode 0700. Raises NotInTree, FileNotFoundError.
        """
        key = tuple(parts)
        if (known := self._open.get(key)) is not None:
            return known
        parent_fd = self.directory_fd(key[:-1], create=create)
        if create:
            try:
                os.mkdir(key[-1], 0o700, dir_fd=parent_fd)
            except FileExistsError:
                pass
        try:
            opened_fd = os.open(key[-1], _DIRECTORY, dir_fd=parent_fd)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise NotInTree(error.errno, "is a link or no directory", "/".join(key)) from None
            raise
        if len(self._open) > self._REMEMBERED:
            oldest = next(parts for parts in self._open if parts)
            os.close(self._open.pop(oldest))
        self._open[key] = opened_fd
        return opened_fd

    def remove(self, parts: Parts) -> bool:
        """Removes what is there, a directory with all that is in it; whether there was something.

        Raises NotInTree.
        """
        try:
            parent_fd = self.directory_fd(parts[:-1])
            if not stat.S_ISDIR(os.stat(parts[-1], dir_fd=parent_fd, follow_symlinks=False).st_mode):
                os.unlink(parts[-1], dir_fd=parent_fd)
                return True
        except FileNotFoundError:
            return False
        for known in [known for known in self._open if known[: len(parts)] == parts]:
            os.close(self._open.pop(known))
        # By descriptors and without following links, so what is in the tree leads it nowhere else.
        shutil.rmtree(parts[-1], dir_fd=parent_fd)
        return True

    def open_file(self, parts: Sequence[str]) -> int:
        """Descriptor, the caller's own, for reading a file that is not a link. A FIFO does not block."""
        parent_fd = self.directory_fd(parts[:-1])
        try:
            return os.open(
                parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent_fd
            )
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise NotInTree(error.errno, "is a link", "/".join(parts)) from None
            raise
