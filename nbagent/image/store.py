"""The image store: archives in, read-only root filesystems out, found by name or by digest.

    PATH/sha256-DIGEST/rootfs/      the image, its owners shifted into the image's own range of host ids
    PATH/sha256-DIGEST/static/      its web assets, for the router
    PATH/sha256-DIGEST/image.json   what is known about it; made by us, so it is believed
    PATH/names/NAME                 a link to ../sha256-DIGEST

Content-addressed: a digest names one archive for ever, so a tree is never changed once it is here, and a
slot that runs on it is not disturbed when the name moves on to another. A tree is staged, synced and then
renamed; whoever reads sees all of it or nothing and needs no lock. Writers take turns.

Not for deciding when an image may go: `collect` is told what is in use.
"""

from __future__ import annotations

import builtins
import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbagent.errors import ImageInvalid, ImageNotFound
from nbagent.image import archive as archives
from nbagent.image import ids, static
from nbagent.image import manifest as manifests
from nbagent.image.manifest import Manifest
from nbagent.image.tree import NotInTree, Tree

DEFAULT_PATH = Path("/var/lib/nbagent/images")

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_DIGEST = re.compile(r"sha256-[0-9a-f]{64}")
_STAGING = ".staging-"
_FORMAT = 1


@dataclass(frozen=True)
class Image:
    """An image in the store.

    `digest` is `sha256-` and 64 hexadecimal digits, `root` its root filesystem and `static` its web
    assets. Its ids 0 to 65535 are `id_base` and up on the host. The rest is as in its manifest; `python` and
    `home` are paths inside.
    """

    name: str
    digest: str
    root: Path
    static: Path
    id_base: int
    python: str
    home: str
    user: str
    launch: str
    environment: Mapping[str, str]


class ImageStore:
    """The images below one directory. Several processes may use it at once."""

    def __init__(
        self,
        path: Path = DEFAULT_PATH,
        *,
        id_bases: range = ids.BASES,
        limits: archives.Limits = archives.Limits(),  # noqa: B008  frozen
        chown: archives.Chown = os.chown,
    ) -> None:
        self.path = path
        self._id_bases, self._limits, self._chown = id_bases, limits, chown

    def add(self, archive: Path, name: str) -> Image:
        """Put an archive into the store, unless it is there, and let `name` mean it from now on.

        A name that meant another image moves; that image stays until it is collected. Raises ImageInvalid.
        """
        _check_name(name)
        with self._writing(), archive.open("rb") as file:
            before = os.fstat(file.fileno())
            digest = "sha256-" + hashlib.file_digest(file, "sha256").hexdigest()
            if not (self.path / digest).exists():
                with self._staged() as staging:
                    self._fill(staging, file.fileno(), digest)
                    after = os.fstat(file.fileno())
                    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                        raise ImageInvalid(f"{archive} was changed while it was read")
                    _sync(staging)
                    staging.rename(self.path / digest)
            self._point(name, digest)
        return self.get(name)

    def get(self, name: str) -> Image:
        """The image that `name` means now. Raises ImageNotFound."""
        _check_name(name)
        try:
            return self._load((self.path / "names" / name).readlink().name, name)
        except FileNotFoundError:
            raise ImageNotFound(f"no image is called {name!r}", image=name) from None

    def list(self) -> list[Image]:
        """All images that have a name, by name."""
        found = []
        for name in self._names():
            try:
                found.append(self.get(name))
            except ImageNotFound:  # removed since we looked
                continue
        return found

    def remove(self, name: str) -> None:
        """Take the name away; the tree stays until it is collected, since slots may run on it.

        Raises ImageNotFound.
        """
        _check_name(name)
        with self._writing():
            try:
                (self.path / "names" / name).unlink()
            except FileNotFoundError:
                raise ImageNotFound(f"no image is called {name!r}", image=name) from None

    def collect(self, in_use: Collection[str]) -> builtins.list[str]:
        """Delete every tree that has neither a name nor its digest in `in_use`; return their digests."""
        with self._writing():
            named = {(self.path / "names" / name).readlink().name for name in self._names()}
            unwanted = [digest for digest in self._digests() if digest not in named and digest not in in_use]
            for digest in unwanted:
                # Half deleted it would still look like an image, so it loses its name first.
                (self.path / digest).rename(self.path / f"{_STAGING}{digest}")
            self._sweep()
        return unwanted

    def _names(self) -> builtins.list[str]:
        return _matching(self.path / "names", _NAME)

    def _digests(self) -> builtins.list[str]:
        return _matching(self.path, _DIGEST)

    def _load(self, digest: str, name: str) -> Image:
        tree = self.path / digest
        facts = _read_facts(tree)
        manifest = manifests.from_mapping(facts["manifest"])
        return Image(
            name=name,
            digest=digest,
            root=tree / "rootfs",
            static=tree / "static",
            id_base=facts["id_base"],
            python=manifest.python,
            home=manifest.home,
            user=manifest.user,
            launch=manifest.launch,
            environment=manifest.environment,
        )

    def _fill(self, staging: Path, archive_fd: int, digest: str) -> None:
        rootfs, assets = staging / "rootfs", staging / "static"
        rootfs.mkdir(0o700)
        assets.mkdir(0o755)
        id_base = self._free_id_base()
        archives.extract(archive_fd, rootfs, id_base, self._limits, self._chown)
        manifest = _read_manifest(rootfs)
        static.publish(rootfs, manifest.static, assets, self._limits.unpacked_bytes)
        facts = {
            "format": _FORMAT,
            "digest": digest,
            "id_base": id_base,
            "manifest": manifests.to_mapping(manifest),
        }
        (staging / "image.json").write_text(json.dumps(facts, indent=2) + "\n")
        # Whoever knows the digest may pass, nginx and slots do; nobody may look around.
        staging.chmod(0o711)

    def _free_id_base(self) -> int:
        used = [_read_facts(self.path / digest)["id_base"] for digest in self._digests()]
        return ids.free_base(self._id_bases, used, ids.reserved())

    def _point(self, name: str, digest: str) -> None:
        names = self.path / "names"
        link = names / f"{_STAGING}{name}"
        link.unlink(missing_ok=True)
        link.symlink_to(f"../{digest}")
        link.rename(names / name)
        _sync(names)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time, in a store that exists and that no dead writer has left untidy."""
        for directory in (self.path, self.path / "names"):
            directory.mkdir(0o711, parents=True, exist_ok=True)
            directory.chmod(0o711)
        with (self.path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._sweep()
            yield

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        """A private directory (mode 0700) that is gone afterwards, unless it got another name."""
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self.path))
        try:
            yield staging
        finally:
            if staging.exists():
                _delete(staging)

    def _sweep(self) -> None:
        for leftover in self.path.glob(f"{_STAGING}*"):
            _delete(leftover)


def _matching(directory: Path, pattern: re.Pattern[str]) -> list[str]:
    try:
        return sorted(entry.name for entry in directory.iterdir() if pattern.fullmatch(entry.name))
    except FileNotFoundError:
        return []


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ImageInvalid(
            f"{name!r} is no name for an image: expected small letters, digits, '.', '_' and '-', at most 63",
            field="name",
        )


def _read_facts(tree: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((tree / "image.json").read_text())
    if facts["format"] != _FORMAT:
        raise ImageInvalid(f"{tree} is of another version of nbagent; remove it and add the image again")
    return facts


def _read_manifest(rootfs: Path) -> Manifest:
    try:
        with Tree(rootfs) as tree, open(tree.open_file(manifests.PATH.split("/")), "rb") as file:
            content = file.read(manifests.MAX_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError, NotInTree):
        raise ImageInvalid(
            f"the image has no file /{manifests.PATH}; images/README.md says what belongs in it"
        ) from None
    if len(content) > manifests.MAX_BYTES:
        raise ImageInvalid(f"/{manifests.PATH} is larger than {manifests.MAX_BYTES} bytes")
    try:
        return manifests.parse(content.decode())
    except UnicodeDecodeError as error:
        raise ImageInvalid(f"/{manifests.PATH} is not UTF-8: {error}") from None


def _delete(tree: Path) -> None:
    # As root, modes do not matter; for anybody else a directory must be writable before it can be emptied.
    if os.geteuid() != 0:
        for directory, _, _ in os.walk(tree):
            os.chmod(directory, 0o700)
    shutil.rmtree(tree)


def _sync(directory: Path) -> None:
    """Wait until the directory's file system is on disk: one call, not one for each of 20,000 files."""
    directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(directory_fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(directory))
    finally:
        os.close(directory_fd)
