# SPDX-License-Identifier: BSD-3-Clause
"""Writes the files of a claim below the slot's home directory, as the slot's user, with reasons for the claimant.

A symbolic link on the way is followed if it stays below the directory (untrusted/tree.py). The file itself is always
new: an existing file or link of its name is replaced.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Iterable, Iterator

from nbagent.untrusted.refusal import Refused, plain
from nbagent.untrusted.tar import Parts
from nbagent.untrusted.tree import Tree

_REASONS = {
    errno.EXDEV: "a symbolic link on the way leads out of the home directory",
    errno.ELOOP: "too many symbolic links are on the way",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EISDIR: "a directory has this name",
    errno.EEXIST: "something else has this name",
    errno.ENAMETOOLONG: "the path is too long",
    errno.ENOSPC: "the slot's storage is full",
    errno.EACCES: "the slot's user may not write there",
    errno.EPERM: "the slot's user may not write there",
}


class BeneathWriter:
    """One directory, open. A context manager."""

    def __init__(self, path: str) -> None:
        self._tree = Tree(path, follow_links=True, directory_mode=0o755)

    def __enter__(self) -> BeneathWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._tree.close()

    def make_directory(self, parts: Parts) -> None:
        """Creates a directory and its parents; an existing one is kept. Raises Refused."""
        with _refused(parts):
            self._tree.directory_fd(parts, create=True)

    def write(self, parts: Parts, chunks: Iterable[bytes], executable: bool = False) -> None:
        """Writes a new file. Raises Refused, and the exceptions of `chunks`."""
        with _refused(parts):
            self._tree.remove_file(parts)
            fd = self._tree.create_file(parts, 0o755 if executable else 0o644)
        try:
            for chunk in chunks:
                with _refused(parts):
                    _write(fd, chunk)
        finally:
            os.close(fd)

    def link(self, parts: Parts, target: str) -> None:
        """Creates a symbolic link whose target is below the directory. Raises Refused."""
        depth = len(parts) - 1
        for part in target.split("/"):
            depth += -1 if part == ".." else part not in ("", ".")
            if depth < 0 or target.startswith("/"):
                raise Refused(f"{_shown(parts)}: a link to {plain(target)}, which is outside of the home directory")
        with _refused(parts):
            self._tree.remove_file(parts)
            self._tree.symlink(parts, target)

    def hard_link(self, parts: Parts, source: Parts) -> None:
        """Gives a file that is below the directory a second name. Raises Refused."""
        with _refused(parts):
            self._tree.remove_file(parts)
            self._tree.hard_link(parts, source)


def _write(fd: int, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[os.write(fd, rest):]


@contextlib.contextmanager
def _refused(parts: Parts) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, os.strerror(error.errno or 0))
        raise Refused(f"{_shown(parts)}: {reason}") from error


def _shown(parts: Parts) -> str:
    return plain("/".join(parts), 300)
