# SPDX-License-Identifier: BSD-3-Clause
"""Copies of an image's web assets, which the router serves without a request to a slot.

They are copied, because nginx runs on the host and would follow a link of a hostile image out of its tree. Only regular
files are copied. Beside each file that compression makes smaller is a `.gz` for nginx's `gzip_static`, and, if
python3-brotli is installed, a `.br`. They have the file's own time, so that ETag and Last-Modified
are equal on every host of a fleet.

The router serves one tree at two addresses: below each slot's `static/`, where a file that is not in the tree is
requested from the slot; and at /assets/DIGEST/, which is the same for all slots of the image, so that a browser or a
CDN has each file once. For the latter JupyterLab's federated extensions are in the tree too.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from nbagent.core.errors import ImageInvalid
from nbagent.image.tree import open_tree
from nbagent.untrusted.tar import Parts
from nbagent.untrusted.tree import NotInTree, Tree
from nbagent.wire.assets import EXTENSIONS, PROGRAM

try:
    import brotli
except ImportError:  # python3-brotli is not installed
    brotli = None

_COMPRESSIBLE = {
    *(".css", ".htm", ".html", ".js", ".json", ".map", ".md", ".mjs", ".svg", ".txt", ".wasm", ".xml"),
    *(".eot", ".ico", ".otf", ".ttf"),
}
# A response below the size of a packet needs no round trip less when it is compressed; compare nginx's gzip_min_length.
_COMPRESS_FROM_BYTES = 1024
_COMPRESS_UP_TO_BYTES = 64 << 20
_LEVEL = 9
# The highest: half a minute of processor time for JupyterLab, once for each image.
_BROTLI_QUALITY = 11
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
    pending: list[Future[None]] = []
    with ExitStack() as stack:
        tree = stack.enter_context(open_tree(rootfs))
        # zlib releases the GIL, so threads use every processor.
        workers = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
        for prefix, path in prefixes.items():
            for parts in _files(tree, tuple(path.strip("/").split("/")), prefix):
                if (left_files := left_files - 1) < 0:
                    raise ImageInvalid(f'static."{prefix}": more than {limit_files} files')
                relative = parts[path.count("/") :]
                copy = target.joinpath(*filter(None, prefix.split("/")), *relative)
                left_bytes -= _copy(tree, parts, copy, left_bytes, prefix)
                if _worth_compressing(copy):
                    pending.append(workers.submit(_compress, copy))
        for future in pending:
            future.result()
    for directory, _, _ in os.walk(target):
        os.chmod(directory, 0o755)  # noqa: S103  nginx reads here as its own user


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


def _worth_compressing(path: Path) -> bool:
    return (
        path.suffix.lower() in _COMPRESSIBLE
        and _COMPRESS_FROM_BYTES < path.stat().st_size <= _COMPRESS_UP_TO_BYTES
    )


def _compress(path: Path) -> None:
    content = path.read_bytes()
    _put_beside(path, ".gz", gzip.compress(content, _LEVEL, mtime=0), len(content))
    if brotli is not None:
        _put_beside(path, ".br", brotli.compress(content, quality=_BROTLI_QUALITY), len(content))


def _put_beside(path: Path, suffix: str, packed: bytes, content_bytes: int) -> None:
    if len(packed) >= content_bytes:
        return
    beside = path.with_name(path.name + suffix)
    try:
        with beside.open("xb") as file:
            file.write(packed)
    except FileExistsError:  # the image contains one
        return
    beside.chmod(0o644)
    time_ns = path.stat().st_mtime_ns
    os.utime(beside, ns=(time_ns, time_ns))
