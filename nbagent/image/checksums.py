# SPDX-License-Identifier: BSD-3-Clause
"""Checksums of an image's files, written when it is added, by which `nbagent doctor` finds a damaged image.

A damaged file is noticed late otherwise: a zygote has read most of them and forks slots for hours. All files are
compared by name, type and size, and some of them, which a caller chooses by chance, by content. This is against faults
of disks and of operators; who can write to the store can write its checksums too.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

_BLOCK_BYTES = 1 << 20


def write(root: Path, file: Path) -> None:
    """Writes the checksums of the tree `root`, whose files do not change any more, to `file`."""
    # A file with several names is read once.
    known: dict[int, str] = {}
    found: dict[str, object] = {}
    for name, status, directory_fd in _files(root):
        if stat.S_ISREG(status.st_mode) and status.st_ino not in known:
            known[status.st_ino] = _digest(name, directory_fd)
        found[name] = _entry(name, status, directory_fd, known.get(status.st_ino))
    file.touch(0o600)  # the names of an image's files are for root only
    file.write_text(json.dumps(found))


def damaged(root: Path, file: Path, most_bytes: int, source: random.Random) -> Iterator[str]:
    """The names of files of `root` that are not as `file` has them: each whose type or size differs, that is missing or
    new, and by content those that `source` chooses until they have `most_bytes`. Raises OSError and ValueError.
    """
    expected = json.loads(file.read_text())
    regular = [name for name, entry in expected.items() if isinstance(entry, list)]
    chosen, read_bytes = set(), 0
    for name in source.sample(regular, len(regular)):
        if read_bytes >= most_bytes:
            break
        read_bytes += expected[name][0]
        chosen.add(name)
    for name, status, directory_fd in _files(root):
        wanted = expected.pop(name, None)
        digest = None
        if isinstance(wanted, list) and stat.S_ISREG(status.st_mode):
            digest = _digest(name, directory_fd) if name in chosen else wanted[1]
        if _entry(name, status, directory_fd, digest) != wanted:
            yield name
    yield from expected


def _files(root: Path) -> Iterator[tuple[str, os.stat_result, int]]:
    """All but directories below `root`: the path in it, the status and a descriptor of the directory, valid until the
    next one.
    """
    def fail(error: OSError) -> None:
        raise error

    for directory, _, names, directory_fd in os.fwalk(root, onerror=fail):
        # Names of links to directories are not among `names`, and no link is followed.
        for name in sorted({*names, *(entry.name for entry in os.scandir(directory_fd) if entry.is_symlink())}):
            status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
            yield os.path.relpath(os.path.join(directory, name), root), status, directory_fd


def _entry(name: str, status: os.stat_result, directory_fd: int, digest: str | None) -> object:
    """The entry of a file: size and digest; the target of a link; the type of any other, such as a device."""
    if stat.S_ISREG(status.st_mode):
        return [status.st_size, digest]
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(name.rpartition("/")[2], dir_fd=directory_fd)
    return {"type": stat.S_IFMT(status.st_mode)}


def _digest(name: str, directory_fd: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(name.rpartition("/")[2], flags, dir_fd=directory_fd), "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
