# SPDX-License-Identifier: BSD-3-Clause
"""Copies of an image's web assets, which the router serves without a request to a slot.

They are copied, because nginx runs on the host and would follow a link of a hostile image out of its tree. Only regular
files are copied, with their compressed copies. These have the file's own time, so that ETag and Last-Modified are equal
on every host of a fleet.

The router serves one tree at two addresses: below each slot's `static/`, where a file that is not in the tree is
requested from the slot; and at /assets/DIGEST/, which is the same for all slots of the image, so that a browser or a
CDN has each file once. For the latter JupyterLab's federated extensions are in the tree too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from nbagent.core.errors import ImageInvalid
from nbagent.image.compression import compress
from nbagent.image.tree import open_tree
from nbagent.untrusted.tar import Parts
from nbagent.untrusted.tree import NotInTree, Tree
from nbagent.wire.assets import EXTENSIONS, PROGRAM

_DOCUMENTS = (".htm", ".html", ".xht", ".xhtml", ".xml")


def jupyterlab_prefixes(rootfs: Path, prefixes: Mapping[str, str]) -> dict[str, str]:
    """`prefixes` with that of JupyterLab's extensions, whose place follows from that of its program.

    JupyterLab has its program in SHARE/lab/static, and extensions in SHARE/labextensions. They are left out, and so
    served by the slot, if one has an HTML page, because such a page needs the slot's origin and /assets has none.
    """
    program = PurePosixPath(prefixes.get(PROGRAM, "/"))
    if program.parts[-2:] != ("lab", "static"):
        return dict(prefixes)
    extensions = program.parent.parent / "labextensions"
    with open_tree(rootfs) as tree:
        try:
            names = [parts[-1].lower() for parts in _files(tree, extensions.parts[1:], EXTENSIONS)]
        except ImageInvalid:  # the image has none, or a link on the way
            return dict(prefixes)
    if not names or any(name.endswith(_DOCUMENTS) for name in names):
        return dict(prefixes)
    return {EXTENSIONS: str(extensions), **prefixes}


def published(static: Path) -> tuple[str, ...]:
    """The parts of JupyterLab that are in a published tree."""
    return tuple(part for part in (PROGRAM, EXTENSIONS) if (static / part).is_dir())


def publish(rootfs: Path, prefixes: Mapping[str, str], target: Path, limit_bytes: int, limit_files: int) -> None:
    """Copy the directories of the image that `prefixes` names to `target`/PREFIX. Raises ImageInvalid.

    `target` exists and is empty. Everything in it becomes world-readable and the caller's own. The limits are for the
    copies, because several prefixes may name one directory, and a file may have many names.
    """
    left_bytes, left_files = limit_bytes, limit_files
    copies = []
    with open_tree(rootfs) as tree:
        for prefix, path in prefixes.items():
            for parts in _files(tree, tuple(path.strip("/").split("/")), prefix):
                if (left_files := left_files - 1) < 0:
                    raise ImageInvalid(f'static."{prefix}": more than {limit_files} files')
                relative = parts[path.count("/") :]
                copy = target.joinpath(*filter(None, prefix.split("/")), *relative)
                left_bytes -= _copy(tree, parts, copy, left_bytes, prefix)
                copies.append(copy)
    # After all are copied, because some may be compressed copies of others.
    compress(path for path in copies if path.exists())
    for directory, _, _ in os.walk(target):
        os.chmod(directory, 0o755)  # noqa: S103  nginx reads here as its own user


def web_files(rootfs: Path, prefixes: Mapping[str, str]) -> list[Path]:
    """The regular files of the directories that `prefixes` names, which no link leads to. Raises ImageInvalid."""
    found: list[Path] = []
    with open_tree(rootfs) as tree:
        for prefix, path in prefixes.items():
            parts = tuple(path.strip("/").split("/"))
            found += [rootfs.joinpath(*file) for file in _files(tree, parts, prefix)]
    return [path for path in found if path.is_file()]


def _files(tree: Tree, parts: Parts, prefix: str) -> Iterator[Parts]:
    """Every regular file below a directory of the tree."""
    try:
        directory_fd = tree.directory_fd(parts)
    except (NotInTree, FileNotFoundError) as error:
        raise ImageInvalid(
            f'static."{prefix}": /{"/".join(parts)} is not a directory of the image, or a link is on the way',
            key=f"static.{prefix}",
        ) from error
    with os.scandir(directory_fd) as found:
        entries = sorted((e.name, e.is_dir(follow_symlinks=False)) for e in found if not e.is_symlink())
    for name, is_directory in entries:
        if is_directory:
            yield from _files(tree, (*parts, name), prefix)
        else:
            yield (*parts, name)


def _copy(tree: Tree, parts: Parts, copy: Path, limit_bytes: int, prefix: str) -> int:
    """Copy one file and return its size, 0 for one that is not a regular file and is skipped."""
    if (source := tree.open_regular(parts)) is None:
        return 0
    with source:
        status = os.fstat(source.fileno())
        # A file with many hard links is copied many times.
        if status.st_size > limit_bytes:
            raise ImageInvalid(f'static."{prefix}": the files are larger than the limit for an image')
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with copy.open("xb") as file:
                while chunk := source.read(1 << 20):
                    file.write(chunk)
        except (FileExistsError, NotADirectoryError):
            raise ImageInvalid(
                f'static."{prefix}": another prefix has {copy.name} at the same place'
            ) from None
    copy.chmod(0o644)
    os.utime(copy, ns=(status.st_mtime_ns, status.st_mtime_ns))
    return status.st_size

