"""The image store: archives in, read-only root filesystems out, found by name or by digest.

    PATH/sha256-DIGEST/rootfs/      the image, its owners shifted into the image's own range of host ids
    PATH/sha256-DIGEST/static/      its web assets, for the router
    PATH/sha256-DIGEST/image.json   what is known about it; made by us, so it is believed
    PATH/names/NAME                 a link to ../sha256-DIGEST
    PATH/former/NAME                the same, of what NAME meant before: one step back is always possible
    PATH/.staging-*                 what is on its way in or out; whoever works on it holds a lock on it

Content-addressed: a digest names one archive for ever, so a tree is never changed once it is here, and a
slot that runs on it is not disturbed when the name moves on to another. A tree is staged, synced and then
renamed; whoever reads sees all of it or nothing and needs no lock. Writers take turns, and never for longer
than it takes to write a few links: downloading, unpacking and deleting go on beside each other.

Not for deciding when an image may go: `retire` is told what is in use.
"""

from __future__ import annotations

import builtins
import ctypes
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbagent.core.errors import ImageInvalid, ImageNotFound
from nbagent.core.events import Event, emit
from nbagent.core.model import IMAGE_NAME, IMAGE_NAME_EXPECTED
from nbagent.image import archive as archives
from nbagent.image import ids, oci, static
from nbagent.image import manifest as manifests
from nbagent.image.manifest import Manifest
from nbagent.image.tree import open_tree
from nbagent.untrusted.tree import NotInTree

DEFAULT_PATH = Path("/var/lib/nbagent/images")

_DIGEST = re.compile(r"sha256-[0-9a-f]{64}")
_PREFIX = re.compile(r"(?:sha256-)?([0-9a-f]{4,64})")
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
    python: str | None
    command: tuple[str, ...]
    port: int | None
    ready: str
    url: str
    home: str
    directory: str
    user: str
    launch: str
    preload: tuple[str, ...]
    environment: Mapping[str, str]


_OF_MANIFEST = ("python", "command", "port", "ready", "url", "home", "directory", "user", "launch",
                "preload", "environment")


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

    def add(self, archive: Path, name: str) -> Image:
        """Put an archive into the store, unless it is there, and let `name` mean it from now on.

        A name that meant another image moves; that image stays for one step back. Raises ImageInvalid.
        """
        _check_name(name)
        with archive.open("rb") as file:
            before = os.fstat(file.fileno())
            digest = "sha256-" + hashlib.file_digest(file, "sha256").hexdigest()
            if not self._known(digest, name):
                with self._staged() as (staging, id_base):
                    rootfs = _rootfs(staging)
                    archives.extract(file.fileno(), rootfs, id_base, self._limits, self._chown)
                    _unchanged(archive, before, file.fileno())
                    self._publish(staging, digest, id_base, _read_manifest(rootfs), name)
        return self.get(name)

    def import_oci(self, source: oci.Source, name: str, manifest: Manifest | None = None) -> Image:
        """Put a container image into the store, as `add` does.

        Without a `manifest` the image has its /etc/nbagent-image.toml, or what its own configuration says
        becomes one. The digest is that of the image's own manifest, as a registry has it, or, with a
        `manifest`, of both. Raises ImageInvalid, FetchFailed.
        """
        _check_name(name)
        with ExitStack() as stack:
            staging, id_base = stack.enter_context(self._staged())
            layout = stack.enter_context(source.layout(staging, id_base, self._limits))
            image = layout.image()
            digest = "sha256-" + image.digest
            if manifest is not None:
                text = json.dumps(manifests.to_mapping(manifest), sort_keys=True)
                digest = "sha256-" + hashlib.sha256(f"{digest}\n{text}".encode()).hexdigest()
            if not self._known(digest, name):
                rootfs = _rootfs(staging)
                layers = [stack.enter_context(layout.open_layer(layer)).fileno() for layer in image.layers]
                archives.extract_layers(layers, rootfs, id_base, self._limits, self._chown)
                if manifest is None:
                    manifest = _find_manifest(rootfs) or oci.manifest_of(image.config, rootfs)
                layout.discard()
                self._publish(staging, digest, id_base, manifest, name)
        return self.get(name)

    def use(self, name: str, reference: str) -> Image:
        """Let `name` mean an image that is here: that of another name, or of the digest that begins so.

        What the name meant stays for one step back, so using that again rolls back. Raises ImageNotFound.
        """
        _check_name(name)
        with self._locked():
            self._point(name, self._resolve(reference))
        return self.get(name)

    def get(self, name: str) -> Image:
        """The image that `name` means now. Raises ImageNotFound."""
        _check_name(name)
        try:
            return self._load(self._link("names", name).readlink().name, name)
        except FileNotFoundError:
            raise ImageNotFound(f"no image is called {name!r}", image=name) from None

    def former(self, name: str) -> str | None:
        """The digest of what `name` meant before, as long as that is here."""
        try:
            return self._link("former", name).readlink().name
        except FileNotFoundError:
            return None

    def list(self) -> list[Image]:
        """All images that have a name, by name. One that cannot be read is passed over, and the journal told:
        the others' users have nothing to do with it.
        """
        found = []
        for name in self._names():
            try:
                found.append(self.get(name))
            except ImageNotFound:  # removed since we looked
                continue
            except ImageInvalid as error:
                emit(Event.IMAGE_UNREADABLE, image=name, text=str(error))
        return found

    def remove(self, name: str) -> None:
        """Take the name away, and the step back; the trees stay until they are retired, since slots may
        run on them. Raises ImageNotFound.
        """
        _check_name(name)
        with self._locked():
            self._link("former", name).unlink(missing_ok=True)
            try:
                self._link("names", name).unlink()
            except FileNotFoundError:
                raise ImageNotFound(f"no image is called {name!r}", image=name) from None

    def retire(self, in_use: Collection[str]) -> builtins.list[str]:
        """Take every tree out of the store that no name means or meant before, and whose digest is not in
        `in_use`; return their digests.

        Quick, and nobody is added or named meanwhile: who asks from the place where slots are started can
        lose none. What was taken out is deleted by `sweep`.
        """
        with self._locked():
            kept = {link.readlink().name for link in self._links()}
            unwanted = [digest for digest in self._digests() if digest not in kept and digest not in in_use]
            for digest in unwanted:
                # Half deleted it would still look like an image, so it loses its name first.
                (self.path / digest).rename(self.path / f"{_STAGING}{digest}-{secrets.token_hex(4)}")
        return unwanted

    def sweep(self) -> None:
        """Delete what was retired, and what a writer that was killed has left. May take seconds."""
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

    def _digests(self) -> builtins.list[str]:
        return _matching(self.path, _DIGEST)

    def _resolve(self, reference: str) -> str:
        """The digest that a name or the beginning of a digest means."""
        if reference in self._names():
            return self._link("names", reference).readlink().name
        found = []
        if match := _PREFIX.fullmatch(reference):
            found = [digest for digest in self._digests() if digest.startswith(f"sha256-{match[1]}")]
        if len(found) == 1:
            return found[0]
        here = ", ".join([*self._names(), *self._digests()]) or "nothing"
        what = "more than one image" if found else "no image"
        raise ImageNotFound(f"{reference!r} means {what}; in the store are: {here}", image=reference)

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
            **{field: getattr(manifest, field) for field in _OF_MANIFEST},
        )

    def _known(self, digest: str, name: str) -> bool:
        """Lets `name` mean the image of this digest, if it is here; whether it is."""
        with self._locked():
            if known := (self.path / digest).exists():
                self._point(name, digest)
        return known

    def _publish(self, staging: Path, digest: str, id_base: int, manifest: Manifest, name: str) -> None:
        """What is staged becomes an image, and `name` means it."""
        assets = staging / "static"
        assets.mkdir(0o755)
        static.publish(staging / "rootfs", manifest.static, assets, self._limits.unpacked_bytes)
        facts = {
            "format": _FORMAT,
            "digest": digest,
            "id_base": id_base,
            "manifest": manifests.to_mapping(manifest),
        }
        (staging / "image.json").write_text(json.dumps(facts, indent=2) + "\n")
        # Whoever knows the digest may pass, nginx and slots do; nobody may look around.
        staging.chmod(0o711)
        _sync(staging)
        with self._locked():
            # Somebody else may have brought the same image meanwhile; then this one is not needed.
            if not (self.path / digest).exists():
                staging.rename(self.path / digest)
            self._point(name, digest)

    def _free_id_base(self, reserved: Collection[range]) -> int:
        used = [_read_facts(self.path / digest)["id_base"] for digest in self._digests()]
        # Others that are on their way in have theirs in their names.
        coming = [path.name.removeprefix(_STAGING).partition("-")[0] for path in self.path.glob(f"{_STAGING}*")]
        used += [int(number) for number in coming if number.isdigit()]
        return ids.free_base(self._id_bases, used, reserved)

    def _point(self, name: str, digest: str) -> None:
        link = self._link("names", name)
        before = link.readlink().name if link.is_symlink() else digest
        if before != digest:
            _replace_link(self._link("former", name), before)
        _replace_link(link, digest)
        _sync_directory(link.parent)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, in a store that exists."""
        for directory in (self.path, self.path / "names", self.path / "former"):
            directory.mkdir(0o711, parents=True, exist_ok=True)
            directory.chmod(0o711)
        with (self.path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _staged(self) -> Iterator[tuple[Path, int]]:
        """A private directory (mode 0700) and a free range of ids for what will be in it.

        The directory is gone afterwards, unless it got another name. What dead writers left goes before.
        """
        self.sweep()
        # Asked before the lock: where users come from a directory service it takes its time.
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
        raise ImageInvalid(f"{name!r} is no name for an image: expected {IMAGE_NAME_EXPECTED}", field="name")


def _read_facts(tree: Path) -> dict[str, Any]:
    """What is known about an image. Raises FileNotFoundError, ImageInvalid."""
    try:
        facts: dict[str, Any] = json.loads((tree / "image.json").read_text())
        known = facts["format"] == _FORMAT and {"id_base", "manifest"} <= facts.keys()
    except (ValueError, KeyError, TypeError) as error:
        raise ImageInvalid(f"{tree}/image.json is damaged; remove the image and add it again: {error!r}") from None
    if not known:
        raise ImageInvalid(f"{tree} is of another version of nbagent; remove it and add the image again")
    return facts


def _rootfs(staging: Path) -> Path:
    rootfs = staging / "rootfs"
    rootfs.mkdir(0o700)
    return rootfs


def _unchanged(archive: Path, before: os.stat_result, fd: int) -> None:
    after = os.fstat(fd)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ImageInvalid(f"{archive} was changed while it was read")


def _read_manifest(rootfs: Path) -> Manifest:
    if (manifest := _find_manifest(rootfs)) is None:
        raise ImageInvalid(
            f"the image has no file /{manifests.PATH}; images/README.md says what belongs in it"
        )
    return manifest


def _find_manifest(rootfs: Path) -> Manifest | None:
    try:
        with open_tree(rootfs) as tree, open(tree.open_file(tuple(manifests.PATH.split("/"))), "rb") as file:
            content = file.read(manifests.MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except (IsADirectoryError, NotInTree):
        raise ImageInvalid(f"/{manifests.PATH} is not a file, or a link is on the way") from None
    return manifests.parse(content)


def _try_lock(directory: Path) -> int | None:
    """A descriptor that keeps others from a staged directory, or None where it is kept from us."""
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
    # As root, modes do not matter; for anybody else a directory must be writable before it can be emptied.
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
    """Wait until the directory's file system is on disk: one call, not one for each of 20,000 files."""
    directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(directory_fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(directory))
    finally:
        os.close(directory_fd)
