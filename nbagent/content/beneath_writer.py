"""Writes below a directory whatever symbolic links are in it, a step at a time and never beside it.

A link that stays below the directory is followed on the way to a file, one that leads out of it is refused by
the kernel (openat2(2), RESOLVE_BENEATH). The file itself is always new: what had its name before, a link too,
is replaced.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import errno
import os
from types import TracebackType
from typing import Iterable, Iterator, Optional, Tuple, Type

from nbagent.linux.openat2 import open_beneath

Parts = Tuple[str, ...]

_REASONS = {
    errno.EXDEV: "a symbolic link on the way leads out of the home directory",
    errno.ELOOP: "too many symbolic links are on the way",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EISDIR: "a directory has this name",
    errno.EEXIST: "something else has this name",
    errno.ENOSPC: "the slot's storage is full",
    errno.EACCES: "the slot's user may not write there",
    errno.EPERM: "the slot's user may not write there",
}


class Refused(Exception):
    """Content that cannot be had; the text is for whoever sent the claim."""


class BeneathWriter:
    """One directory, open. A context manager."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> BeneathWriter:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        os.close(self._fd)

    def make_directory(self, parts: Parts) -> None:
        """Makes a directory and those above it; one that is there is left as it is. Raises Refused."""
        with _explained(parts):
            os.close(self._directory(parts))

    def write(self, parts: Parts, chunks: Iterable[bytes], executable: bool = False) -> None:
        """Writes a new file in the place of what has its name. Raises Refused, and whatever `chunks` does."""
        with _explained(parts), self._parent(parts) as directory:
            _remove(parts[-1], directory)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(parts[-1], flags, 0o755 if executable else 0o644, dir_fd=directory)
        try:
            for chunk in chunks:
                with _explained(parts):
                    _write(fd, chunk)
        finally:
            os.close(fd)

    def link(self, parts: Parts, target: str) -> None:
        """Makes a symbolic link that stays below the directory. Raises Refused."""
        depth = len(parts) - 1
        for part in target.split("/"):
            depth += -1 if part == ".." else part not in ("", ".")
            if depth < 0 or target.startswith("/"):
                raise Refused(f"{'/'.join(parts)}: a link to {target}, which is outside")
        with _explained(parts), self._parent(parts) as directory:
            _remove(parts[-1], directory)
            os.symlink(target, parts[-1], dir_fd=directory)

    def hard_link(self, parts: Parts, source: Parts) -> None:
        """Gives a file that is below the directory a second name. Raises Refused."""
        with _explained(parts), self._parent(parts) as directory, self._parent(source) as source_directory:
            _remove(parts[-1], directory)
            os.link(source[-1], parts[-1], src_dir_fd=source_directory, dst_dir_fd=directory, follow_symlinks=False)

    @contextlib.contextmanager
    def _parent(self, parts: Parts) -> Iterator[int]:
        fd = self._directory(parts[:-1])
        try:
            yield fd
        finally:
            os.close(fd)

    def _directory(self, parts: Parts) -> int:
        """A descriptor of a directory, made if it is not there."""
        path, flags = "/".join(parts) or ".", os.O_PATH | os.O_DIRECTORY
        with contextlib.suppress(FileNotFoundError):
            return open_beneath(self._fd, path, flags)
        parent = self._directory(parts[:-1])
        try:
            os.mkdir(parts[-1], 0o755, dir_fd=parent)
        finally:
            os.close(parent)
        return open_beneath(self._fd, path, flags)


def _remove(name: str, directory: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def _write(fd: int, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[os.write(fd, rest):]


@contextlib.contextmanager
def _explained(parts: Parts) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, os.strerror(error.errno or 0))
        raise Refused(f"{'/'.join(parts)}: {reason}") from error
