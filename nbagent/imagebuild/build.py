# SPDX-License-Identifier: BSD-3-Clause
"""Builds an image recipe to NAME.tar.zst, with the same bytes every time, and keeps it in a cache.

    images/build images/minimal                builds it, or finds it in the cache
    images/build --output DIR images/minimal   the same, and puts a copy into DIR
    images/build --check images/minimal        builds it twice, without the cache, and compares

On standard output is one line in the format of sha256sum, digest and path; progress is on standard error.

The archive depends on the recipe, this package and the packages that Debian serves, and on nothing else of this
machine. Every download is made by apt and pip, as they are configured on this machine, and is verified by Debian's
signature or by the hashes in requirements.txt. The image's programs run in a chroot without network.

It does not fetch images from a registry, and does not add images to the store: `nbagent image` does both. Needs root
and Debian 12 or newer.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nbagent.core.errors import ImageInvalid
from nbagent.image import manifest, static
from nbagent.image.compression import compress
from nbagent.imagebuild import rootfs
from nbagent.imagebuild.commands import fail, install_tools, progress
from nbagent.imagebuild.pack import entries, pack
from nbagent.imagebuild.recipe import Recipe, read_recipe


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="images/build", description="Build an image recipe to NAME.tar.zst, reproducibly."
    )
    parser.add_argument("recipe", type=Path, help="recipe directory, for example images/minimal")
    parser.add_argument("--check", action="store_true", help="build twice, without the cache, and compare")
    parser.add_argument("--output", type=Path, metavar="DIR", help="put a copy of the archive there")
    arguments = parser.parse_args()
    recipe = read_recipe(arguments.recipe)
    if os.geteuid() != 0:
        fail("only root can create a root filesystem")
    os.umask(0o022)
    cache = Path(os.environ.get("NBAGENT_CACHE") or "/var/cache/nbagent-build") / "images"
    cache.mkdir(parents=True, exist_ok=True)
    if arguments.check:
        check(recipe, cache)
        return
    archive = cached(recipe, cache)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        archive = Path(shutil.copy(archive, arguments.output))
    sys.stdout.write(f"{digest_of(archive)}  {archive}\n")


def cached(recipe: Recipe, cache: Path) -> Path:
    """The archive in the cache, built if necessary. A second build of the same recipe waits for the first."""
    archive = _cached_path(recipe, cache)
    with (cache / f".lock-{recipe.name}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if archive.exists():
            progress(f"{archive.name} is in the cache")
            return archive
        install_tools()
        with _scratch_directory(cache) as scratch:
            return _keep(build(recipe, scratch), recipe, cache)


def check(recipe: Recipe, cache: Path) -> None:
    """Build twice and fail unless both archives are equal."""
    install_tools()
    digests = []
    for ordinal in ("first", "second"):
        progress(f"{ordinal} build")
        with _scratch_directory(cache) as scratch:
            archive = build(recipe, scratch)
            digests.append(digest_of(archive))
            progress(f"{ordinal} build: sha256 {digests[-1]}")
            if digests[0] == digests[-1]:
                _keep(archive, recipe, cache)
    if digests[0] != digests[1]:
        fail(f"{recipe.name} is not reproducible: {digests[0]}, then {digests[1]}")
    progress(f"{recipe.name} is reproducible")


def build(recipe: Recipe, scratch: Path) -> Path:
    """The archive, built in the directory `scratch`, which the caller removes."""
    root = scratch / "root"
    rootfs.create(recipe, root, scratch)
    _compress_web_files(root)
    progress("packing")
    archive = scratch / f"{recipe.name}.tar.zst"
    pack(root, archive, recipe.source_date_epoch)
    size = sum(path.lstat().st_size for _, path in entries(root))
    progress(f"{archive.name}: {archive.stat().st_size / 1e6:.0f} MB, {size / 1e6:.0f} MB unpacked")
    return archive


def _compress_web_files(root: Path) -> None:
    """Puts compressed copies beside the files that the router serves, by the image's manifest."""
    document = root / manifest.PATH
    if not document.exists():
        return
    progress("compressing web files")
    try:
        prefixes = static.jupyterlab_prefixes(root, manifest.parse(document.read_bytes()).static)
        compress(static.web_files(root, prefixes))
    except ImageInvalid as error:
        fail(str(error))


def digest_of(archive: Path) -> str:
    with archive.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _scratch_directory(cache: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as name:
        os.chmod(name, 0o755)  # noqa: S103  apt reads in it as a user of its own
        yield Path(name)


def _cached_path(recipe: Recipe, cache: Path) -> Path:
    return cache / recipe.key() / f"{recipe.name}.tar.zst"


def _keep(archive: Path, recipe: Recipe, cache: Path) -> Path:
    """Move a finished archive into the cache, by a rename, so that there is never an incomplete one."""
    path = _cached_path(recipe, cache)
    path.parent.mkdir(exist_ok=True)
    return archive.rename(path)
