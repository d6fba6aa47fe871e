# SPDX-License-Identifier: BSD-3-Clause
"""The image store: adds archives as read-only root filesystems, and finds them by name or by digest.

    PATH/sha256-DIGEST/rootfs/      the image, its owners shifted into the image's own range of host ids
    PATH/sha256-DIGEST/static/      its web assets, for the router
    PATH/sha256-DIGEST/image.json   its record; trusted, because the store writes it
    PATH/sha256-DIGEST/files.json   the checksums of its files
    PATH/names/NAME                 a link to ../sha256-DIGEST
    PATH/former/NAME                a link to the previous image of NAME, so that one step back is always possible
    PATH/.staging-*                 a tree that is being added or deleted, locked by the process that does it

Content-addressed: a digest identifies one archive for ever, so a tree is never changed after it was added, and slots
that run on it are not affected when the name is moved to another image. A tree is staged, synced and then renamed, so
a reader sees the complete tree or none and needs no lock. Writers hold the store's lock only while they write a few
links, so that downloading, unpacking and deleting run in parallel.

The store does not decide which images are in use: the caller of `retire` passes their digests.
"""

from __future__ import annotations

import builtins
import ctypes
import fcntl
import hashlib
import json
import os
import random
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

from nbagent.core import paths
from nbagent.core.errors import ImageInvalid, ImageNotFound
from nbagent.core.events import Event, emit
from nbagent.core.model import IMAGE_NAME, IMAGE_NAME_EXPECTED
from nbagent.image import adaptation, ahead, checksums, elf, ids, oci, static
from nbagent.image import archive as archives
from nbagent.image import manifest as manifests
from nbagent.image.manifest import Manifest, Program
from nbagent.image.passwd import account
from nbagent.image.record import Record, id_base_of
from nbagent.image.tree import open_tree
from nbagent.untrusted.tree import NotInTree
from nbagent.wire.assets import ROUTER_PATH

DEFAULT_PATH = paths.IMAGES

_DIGEST = re.compile(r"sha256-[0-9a-f]{64}")
_PREFIX = re.compile(r"(?:sha256-)?([0-9a-f]{4,64})")
_STAGING = ".staging-"
_CHECKSUMS = "files.json"
# The files that `damaged` compares by content, which takes a tenth of a second.
_COMPARED_BYTES = 64 << 20


def _log_unreadable(name: str, error: Exception) -> None:
    emit(Event.IMAGE_UNREADABLE, image=name, text=str(error))


@dataclass(frozen=True, kw_only=True)
class Image(Program):
    """An image in the store, with the program of its manifest.

    `digest` is `sha256-` and 64 hexadecimal digits, `root` its root filesystem and `static` its web assets.
    `assets` are the parts of JupyterLab that the router serves at /assets/DIGEST/.
    The ids 0 to 65535 of the image are `id_base` and up on the host. `notes` are sentences about what is different
    from a container of the image. `public` are directories that everyone may write to, of which each slot gets copies.
    """

    name: str
    digest: str
    root: Path
    static: Path
    assets: tuple[str, ...] = ()
    id_base: int
    notes: tuple[str, ...] = ()
    public: tuple[str, ...] = ()

    @property
    def assets_path(self) -> str | None:
        """The path of its web assets on the router, None without any part of JupyterLab."""
        return f"{ROUTER_PATH}{self.digest}" if self.assets else None


class ImageStore:
    """The images below one directory. Several processes may use it at once."""

    def __init__(
        self,
        path: Path = DEFAULT_PATH,
        *,
        id_bases: range = ids.BASES,
        limits: archives.ImageArchiveLimits = archives.ImageArchiveLimits(),  # noqa: B008  frozen
        chown: archives.Chown = os.chown,
    ) -> None:
        self.path = path
        self._id_bases, self._limits, self._chown = id_bases, limits, chown

    def add(self, archive: Path, name: str, manifest: Manifest | None = None) -> Image:
        """Add an archive to the store, unless it is there, and point `name` to it.

        A `manifest` replaces the one in the archive; the digest is then that of both. The previous image of the name
        is kept for one step back. Raises ImageInvalid.
        """
        _check_name(name)
        with archive.open("rb") as file:
            before = os.fstat(file.fileno())
            digest = "sha256-" + hashlib.file_digest(file, "sha256").hexdigest()
            if manifest is not None:
                digest = _with_manifest(digest, manifest)
            if not self._known(digest, name):
                with self._staged() as (staging, id_base):
                    rootfs = _rootfs(staging)
                    left_out = archives.extract(file.fileno(), rootfs, id_base, self._limits, self._chown)
                    _unchanged(archive, before, file.fileno())
                    found = _read_manifest(rootfs) if manifest is None else manifest
                    notes = _adapt(rootfs, id_base, found.user, found, left_out, self._chown)
                    self._publish(staging, Record(digest, id_base, found, notes), name)
        return self.get(name)

    def import_oci(self, source: oci.Source, name: str, manifest: Manifest | None = None) -> Image:
        """Add a container image to the store, as `add` does.

        Without a `manifest` the image's /etc/nbagent-image.toml is used; without that, one is derived from its OCI
        configuration. The digest is that of the image's OCI manifest, as in a registry; with a `manifest`, that of
        both. Raises ImageInvalid, FetchFailed.
        """
        _check_name(name)
        with ExitStack() as stack:
            staging, id_base = stack.enter_context(self._staged())
            layout = stack.enter_context(source.layout(staging, id_base, self._limits))
            image = layout.image()
            digest = "sha256-" + image.digest
            if manifest is not None:
                digest = _with_manifest(digest, manifest)
            if not self._known(digest, name):
                rootfs = _rootfs(staging)
                layers = [stack.enter_context(layout.open_layer(layer)).fileno() for layer in image.layers]
                left_out = archives.extract_layers(layers, rootfs, id_base, self._limits, self._chown)
                layout.check_unchanged()
                found = manifest or _find_manifest(rootfs)
                notes: tuple[str, ...] = ()
                if is_derived := found is None:
                    found = oci.manifest_of(image.config, rootfs)
                    notes = oci.notes_of(image.config, found)
                layout.discard()
                # A container without USER runs as root, and a slot as another user.
                user = image.config.user
                notes += _adapt(rootfs, id_base, user, found, left_out, self._chown)
                own = _own_directory(rootfs, id_base, user, found) if is_derived else ()
                self._publish(staging, Record(digest, id_base, found, notes, own), name)
        return self.get(name)

    def use(
        self, name: str, reference: str, manifest: Manifest | None = None, layer: Path | None = None
    ) -> Image:
        """Point `name` to an image of the store, given by another name or by the first digits of its digest.

        With a `manifest`, to the same files with this manifest: a tree of its own, whose files are hard links to those
        of the image, so that neither depends on the other. With a `layer`, the tree also gets the files of this
        archive over the others, as of a container image's uppermost layer. The previous image of the name is kept for
        one step back. Raises ImageNotFound, ImageInvalid.
        """
        _check_name(name)
        if manifest is not None or layer is not None:
            return self._use_changed(name, reference, manifest, layer)
        with self._locked():
            self._point(name, self._resolve(reference))
        return self.get(name)

    def _use_changed(self, name: str, reference: str, manifest: Manifest | None, layer: Path | None) -> Image:
        with ExitStack() as stack:
            staging, _ = stack.enter_context(self._staged())
            with self._locked():
                source = self._resolve(reference)
                record = Record.load(self.path / source)
                # Under the lock, because the tree may be retired meanwhile; this takes a second for 100,000 files.
                command = ["cp", "--archive", "--link", "--", str(self.path / source / "rootfs"), str(staging)]
                if (done := subprocess.run(command, capture_output=True, text=True, check=False)).returncode:
                    raise OSError(f"{source} cannot be linked: {done.stderr.strip()[-500:]}")
            # The ids are those of the files, which both trees share.
            digest, rootfs, found, notes = source, staging / "rootfs", manifest or record.manifest, record.notes
            file = stack.enter_context(layer.open("rb")) if layer is not None else None
            if file is not None:
                digest = _derived(digest, hashlib.file_digest(file, "sha256").hexdigest())
            if manifest is not None:
                digest = _with_manifest(digest, manifest)
            if not self._known(digest, name):
                if layer is not None and file is not None:
                    before = os.fstat(file.fileno())
                    layers = [file.fileno()]
                    left_out = archives.extract_layers(
                        layers, rootfs, record.id_base, self._limits, self._chown, over=True
                    )
                    _unchanged(layer, before, file.fileno())
                    found = manifest or _find_manifest(rootfs) or found
                    # Of the image below, the notes about its files are contained in those about all files.
                    notes = _adapt(rootfs, record.id_base, found.user, found, left_out, self._chown)
                self._publish(staging, replace(record, digest=digest, manifest=found, notes=notes), name)
        return self.get(name)

    def get(self, name: str) -> Image:
        """The image that `name` points to. Raises ImageNotFound."""
        _check_name(name)
        try:
            return self._load(self._link("names", name).readlink().name, name)
        except FileNotFoundError:
            raise ImageNotFound(f"no image has the name {name!r}", image=name) from None

    def damaged(self, name: str) -> builtins.list[str] | None:
        """Files of the image that are not as they were added, by names, types, sizes and the content of some of them.

        None for an image that was added by a version of nbagent without checksums. Raises ImageNotFound, ImageInvalid
        and OSError.
        """
        image = self.get(name)
        file = image.root.parent / _CHECKSUMS
        if not file.exists():
            return None
        try:
            return sorted(checksums.damaged(image.root, file, _COMPARED_BYTES, random.SystemRandom()))
        except ValueError as error:
            raise ImageInvalid(f"{file} is damaged: {error}") from None

    def former(self, name: str) -> str | None:
        """The digest of the previous image of `name`, if there is one."""
        try:
            return self._link("former", name).readlink().name
        except FileNotFoundError:
            return None

    def list(self, skipped: Callable[[str, Exception], None] = _log_unreadable) -> list[Image]:
        """All named images, by name. One that cannot be read is skipped, so that the others stay usable; `skipped` gets
        its name and the error, ImageInvalid or OSError.
        """
        found = []
        for name in self._names():
            try:
                found.append(self.get(name))
            except ImageNotFound:  # removed meanwhile
                continue
            except (ImageInvalid, OSError) as error:
                skipped(name, error)
        return found

    def remove(self, name: str) -> None:
        """Remove a name and its previous image's. The trees stay until they are retired, because slots may run on
        them. Raises ImageNotFound.
        """
        _check_name(name)
        with self._locked():
            self._link("former", name).unlink(missing_ok=True)
            try:
                self._link("names", name).unlink()
            except FileNotFoundError:
                raise ImageNotFound(f"no image has the name {name!r}", image=name) from None

    def retire(self, in_use: Collection[str]) -> builtins.list[str]:
        """Retire every tree that is not the image or the previous image of a name and whose digest is not in `in_use`;
        return their digests. `sweep` deletes retired trees.

        Holds the lock and only renames, so no image is added or named meanwhile. Call it from the thread that
        starts slots, so that no slot can start on a tree while it is retired. Raises OSError, and BlockingIOError
        instead of a wait when another process has the lock, which may be stopped or wait for its disk.
        """
        with self._locked(wait=False):
            kept = {link.readlink().name for link in self._links()}
            unwanted = [digest for digest in self.digests() if digest not in kept and digest not in in_use]
            for digest in unwanted:
                # Renamed before it is deleted, because an incomplete tree would look like an image.
                (self.path / digest).rename(self.path / f"{_STAGING}{digest}-{secrets.token_hex(4)}")
        return unwanted

    def has_retired(self) -> bool:
        """Whether `sweep` may have something to delete."""
        return next(self.path.glob(f"{_STAGING}*"), None) is not None

    def sweep(self) -> None:
        """Delete retired trees, and the staging directories of killed writers. May take seconds."""
        with ExitStack() as stack:
            leftovers = []
            with self._locked():
                for path in self.path.glob(f"{_STAGING}*"):
                    if (lock_fd := _try_lock(path)) is not None:
                        stack.callback(os.close, lock_fd)
                        leftovers.append(path)
            for path in leftovers:
                _delete(path)

    def _link(self, kind: str, name: str) -> Path:
        return self.path / kind / name

    def _links(self) -> Iterator[Path]:
        for kind in ("names", "former"):
            for name in _matching(self.path / kind, IMAGE_NAME):
                yield self._link(kind, name)

    def _names(self) -> builtins.list[str]:
        return _matching(self.path / "names", IMAGE_NAME)

    def digests(self) -> builtins.list[str]:
        """The digests of all images, also of those without a name."""
        return _matching(self.path, _DIGEST)

    def _resolve(self, reference: str) -> str:
        """The digest for a name or for the first digits of a digest."""
        if reference in self._names():
            return self._link("names", reference).readlink().name
        found = []
        if match := _PREFIX.fullmatch(reference):
            found = [digest for digest in self.digests() if digest.startswith(f"sha256-{match[1]}")]
        if len(found) == 1:
            return found[0]
        stored = ", ".join([*self._names(), *self.digests()]) or "none"
        count = "more than one image" if found else "no image"
        raise ImageNotFound(f"{reference!r} matches {count} of the store; expected one of: {stored}", image=reference)

    def _load(self, digest: str, name: str) -> Image:
        tree = self.path / digest
        record = Record.load(tree)
        return Image(
            name=name,
            digest=digest,
            root=tree / "rootfs",
            static=tree / "static",
            assets=static.published(tree / "static"),
            id_base=record.id_base,
            notes=record.notes,
            public=record.public,
            **{field.name: getattr(record.manifest, field.name) for field in fields(Program)},
        )

    def _known(self, digest: str, name: str) -> bool:
        """Points `name` to the image of this digest, if the store has it; whether it has."""
        with self._locked():
            if known := (self.path / digest).exists():
                self._point(name, digest)
        return known

    def _publish(self, staging: Path, record: Record, name: str) -> None:
        """Turns the staged tree into an image, and points `name` to it. `record.public` may have the working directory
        already, because the user of a container may write to it.
        """
        with open_tree(staging / "rootfs") as tree:
            elf.check_machine(tree, record.manifest)
            adaptation.keep_path(tree, record.id_base, record.manifest, self._chown)
            public, public_notes = adaptation.public_directories(tree, record.manifest, record.public)
            environment_notes = adaptation.open_environment(tree, record.id_base, record.manifest, self._chown)
            record = replace(record, public=public, notes=(*record.notes, *environment_notes, *public_notes))
        assets = staging / "static"
        assets.mkdir(0o755)
        limits = self._limits
        prefixes = static.jupyterlab_prefixes(staging / "rootfs", record.manifest.static)
        static.publish(staging / "rootfs", prefixes, assets, limits.unpacked_bytes, limits.entries)
        if static.published(assets):
            ahead.write(assets)
        checksums.write(staging / "rootfs", staging / _CHECKSUMS)
        record.save(staging)
        # nginx and the slots open files below by paths that they know; a listing would show which images there are.
        staging.chmod(0o711)
        _sync(staging)
        with self._locked():
            # Another process may have added the same image meanwhile; the staged tree is then deleted.
            if not (self.path / record.digest).exists():
                staging.rename(self.path / record.digest)
            self._point(name, record.digest)

    def _free_id_base(self, reserved: Collection[range]) -> int:
        used = [id_base_of(self.path / digest) for digest in self.digests()]
        # The names of staging directories contain the base of the image that is being added.
        staged = [path.name.removeprefix(_STAGING).partition("-")[0] for path in self.path.glob(f"{_STAGING}*")]
        used += [int(number) for number in staged if number.isdigit()]
        return ids.free_base(self._id_bases, used, reserved)

    def _point(self, name: str, digest: str) -> None:
        link = self._link("names", name)
        before = link.readlink().name if link.is_symlink() else digest
        if before != digest:
            _replace_link(self._link("former", name), before)
        _replace_link(link, digest)
        _sync_directory(link.parent)

    @contextmanager
    def _locked(self, *, wait: bool = True) -> Iterator[None]:
        """Holds the store's lock, and creates the store if necessary. Raises BlockingIOError instead of a wait."""
        for directory in (self.path, self.path / "names", self.path / "former"):
            directory.mkdir(0o711, parents=True, exist_ok=True)
            directory.chmod(0o711)
        with (self.path / ".lock").open("a") as lock:  # without a change of its time
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    @contextmanager
    def _staged(self) -> Iterator[tuple[Path, int]]:
        """A private directory (mode 0700) and a free range of ids for the tree in it.

        Deletes what killed writers have left before, and the directory afterwards unless it was renamed.
        """
        self.sweep()
        # Before the lock, because this is slow on a host whose users come from a directory service.
        reserved = list(ids.reserved())
        with ExitStack() as stack:
            with self._locked():
                id_base = self._free_id_base(reserved)
                staging = Path(tempfile.mkdtemp(prefix=f"{_STAGING}{id_base}-", dir=self.path))
                lock_fd = _try_lock(staging)
            assert lock_fd is not None
            stack.callback(os.close, lock_fd)
            try:
                yield staging, id_base
            finally:
                if staging.exists():
                    _delete(staging)


def _matching(directory: Path, pattern: re.Pattern[str]) -> list[str]:
    try:
        return sorted(entry.name for entry in directory.iterdir() if pattern.fullmatch(entry.name))
    except FileNotFoundError:
        return []


def _check_name(name: str) -> None:
    if not IMAGE_NAME.fullmatch(name):
        raise ImageInvalid(f"{name!r} is not a name for an image: expected {IMAGE_NAME_EXPECTED}", field="name")


def _rootfs(staging: Path) -> Path:
    rootfs = staging / "rootfs"
    rootfs.mkdir(0o700)
    return rootfs


def _unchanged(archive: Path, before: os.stat_result, fd: int) -> None:
    if not oci.is_unchanged(before, os.fstat(fd)):
        raise ImageInvalid(f"{archive} changed while it was read; add it again")


def _with_manifest(digest: str, manifest: Manifest) -> str:
    """The digest of an image's files and a manifest that replaces the image's own."""
    return _derived(digest, json.dumps(manifests.to_mapping(manifest), sort_keys=True))


def _derived(digest: str, text: str) -> str:
    return "sha256-" + hashlib.sha256(f"{digest}\n{text}".encode()).hexdigest()


def _adapt(
    rootfs: Path, id_base: int, user: str, manifest: Manifest, left_out: Sequence[str], chown: archives.Chown
) -> tuple[str, ...]:
    with open_tree(rootfs) as tree:
        return adaptation.adapt(tree, id_base, account(tree, user), manifest, left_out, chown)


def _own_directory(rootfs: Path, id_base: int, user: str, manifest: Manifest) -> tuple[str, ...]:
    with open_tree(rootfs) as tree:
        return adaptation.own_directory(tree, id_base, account(tree, user), manifest)


def _read_manifest(rootfs: Path) -> Manifest:
    if (manifest := _find_manifest(rootfs)) is None:
        raise ImageInvalid(
            f"the image has no file /{manifests.PATH}; pass one with --manifest; its keys are described in"
            " images/README.md"
        )
    return manifest


def _find_manifest(rootfs: Path) -> Manifest | None:
    try:
        with open_tree(rootfs) as tree:
            file = tree.open_regular(tuple(manifests.PATH.split("/")))
    except FileNotFoundError:
        return None
    except NotInTree:
        file = None
    if file is None:
        raise ImageInvalid(f"/{manifests.PATH} is not a file, or a link is on the way")
    with file:
        return manifests.parse(file.read(manifests.MAX_BYTES + 1))


def _try_lock(directory: Path) -> int | None:
    """A descriptor that holds the lock of a staging directory, or None if another process holds it."""
    try:
        directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(directory_fd)
        return None
    return directory_fd


def _replace_link(link: Path, digest: str) -> None:
    fresh = link.with_name(f"{_STAGING}{link.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(f"../{digest}")
    fresh.rename(link)


def _delete(tree: Path) -> None:
    # Without root, a directory must be writable before its entries can be deleted.
    if os.geteuid() != 0:
        for directory, _, _ in os.walk(tree):
            os.chmod(directory, 0o700)
    shutil.rmtree(tree)


def _sync_directory(directory: Path) -> None:
    directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory_fd)
    finally:
        os.close(directory_fd)


def _sync(directory: Path) -> None:
    """Write the directory's file system to disk: one syncfs(2) is faster than an fsync(2) for each of 20,000 files."""
    directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(directory_fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(directory))
    finally:
        os.close(directory_fd)
