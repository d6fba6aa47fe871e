# SPDX-License-Identifier: BSD-3-Clause
"""Compressed copies beside web files, for nginx's `gzip_static` and `brotli_static`.

`images/build` puts them into the image, so that a host does not spend half a minute of processor time on them. The
image store makes those that an image does not have. Brotli needs python3-brotli, and is left out without it.
"""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_COMPRESSIBLE = {
    *(".css", ".htm", ".html", ".js", ".json", ".map", ".md", ".mjs", ".svg", ".txt", ".wasm", ".xml"),
    *(".eot", ".ico", ".otf", ".ttf"),
}
# A response below the size of a packet needs no round trip less when it is compressed; compare nginx's gzip_min_length.
_COMPRESS_FROM_BYTES = 1024
_COMPRESS_UP_TO_BYTES = 64 << 20
_GZIP_LEVEL = 9
# The highest: 28 s of processor time for JupyterLab 4.6 where a bare fork takes 3 ms.
_BROTLI_QUALITY = 11
_NAME_MAX = 255  # of linux/limits.h


def compress(paths: Iterable[Path]) -> None:
    """Puts `.gz` and `.br` beside each file that they make smaller, with its mode and times.

    A copy of the file's time is left as it is; one of another time is of a former version of the file, and is replaced.
    `paths` are of regular files, and no other program writes to their directories.
    """
    # zlib and brotli release the GIL, so threads use every processor.
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        for done in [workers.submit(_compress, path) for path in paths if _is_worth_it(path)]:
            done.result()


def _is_worth_it(path: Path) -> bool:
    return (
        path.suffix.lower() in _COMPRESSIBLE
        and len(os.fsencode(path.name)) <= _NAME_MAX - len(".br")
        and _COMPRESS_FROM_BYTES < path.stat().st_size <= _COMPRESS_UP_TO_BYTES
    )


def _compress(path: Path) -> None:
    _put_beside(path, ".gz", lambda content: gzip.compress(content, _GZIP_LEVEL, mtime=0))
    with contextlib.suppress(ImportError):
        import brotli

        _put_beside(path, ".br", lambda content: brotli.compress(content, quality=_BROTLI_QUALITY))


def _put_beside(path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    beside, status = path.with_name(path.name + suffix), path.stat()
    if beside.is_dir() or (beside.exists() and beside.stat().st_mtime_ns == status.st_mtime_ns):
        return
    beside.unlink(missing_ok=True)
    packed = pack(path.read_bytes())
    if len(packed) >= status.st_size:
        return
    beside.write_bytes(packed)
    beside.chmod(status.st_mode & 0o777)
    os.utime(beside, ns=(status.st_mtime_ns, status.st_mtime_ns))
